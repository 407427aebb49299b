"""Models: what turns text into tokens, and tokens into vectors.

``build`` puts an ``encoder`` together from a checkpoint: a ``tokenizer`` (``pairs`` for a reranker), one of the
``runtimes``, and ``heads`` that read the token ``states``.
"""
