"""The engine: Infinity's, with its scheduling replaced and encoders of our own.

Modules in the order in which a text meets them: ``sources`` and ``checkpoint`` find and read a model, ``encoders`` run
it, ``scheduler`` decides what runs next, ``batcher`` runs it, ``infinity`` is the engine that holds them together.

Only ``encoders``, ``devices`` and ``infinity`` import torch; the rest is importable without it.
"""
