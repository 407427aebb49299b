"""A cache of computed vectors. Imported only if the registry has a cache."""
