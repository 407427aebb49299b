"""Backends: where a model runs. ``base`` is the protocol; ``fleet`` holds one backend for each model of the registry."""
