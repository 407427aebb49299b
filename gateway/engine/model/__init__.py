"""Models: tokenizers, transformers and heads, which turn text into tokens, and tokens into vectors.

``build`` assembles an ``encoder`` from a checkpoint: a ``tokenizer`` (``pairs`` for a reranker), one of the
``runtimes``, and ``heads`` that read the token ``states``.
"""
