"""Runtimes, which compute a transformer's forward. ``base`` is their protocol with the encoder.

``padded`` runs transformers' model on texts of similar length; ``packed`` runs it on texts of any length without padding
(CUDA); ``openvino`` runs a compiled copy of it (CPU).
"""
