"""Routing: from the name in a request to the target that answers it, and the space of its vectors."""
