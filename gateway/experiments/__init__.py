"""Experiments: the arm of a request, the stats of the arms, and the check of the split."""
