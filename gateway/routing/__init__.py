"""Routing: from the name in a request to the one target that answers it, and the space its vectors are in."""
