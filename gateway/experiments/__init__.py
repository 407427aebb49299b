"""Experiments: which arm a request is of, what came of it, and whether the split is as it was meant."""
