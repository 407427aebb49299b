"""Compare models on the user's own texts: quality where there are judgements, difference where there are none, cost."""
