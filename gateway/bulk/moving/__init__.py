"""``gateway move``: change the embedding model of a collection that applications use."""
