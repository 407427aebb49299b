"""Checkpoints: find one, read its description, and refuse a model that is not served."""
