"""Encoders: what turns tokens into vectors. Each is an Infinity ``BaseEmbedder``.

``base`` is what the batcher needs of one; ``sentence`` serves BERT-like sentence-transformers checkpoints.
"""
