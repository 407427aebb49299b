"""Vectors that have been computed before. Imported only if the registry has a cache."""
