"""Compare models on the user's own texts: quality where there are judgments, difference where there are none, cost."""
