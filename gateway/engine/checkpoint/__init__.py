"""Checkpoints: find one, read what it says of itself, and refuse what is no embedder."""
