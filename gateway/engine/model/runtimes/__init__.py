"""Runtimes: how a transformer's forward is computed. ``base`` is the protocol between them and the encoder.

``padded`` runs transformers' model on texts of similar length; ``packed`` runs it on texts of any length without padding
(CUDA); ``openvino`` runs a compiled copy of it (CPU).
"""
