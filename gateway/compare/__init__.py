"""Compare models on the user's own texts: quality with judgments, difference without them, and cost."""
