"""Captured queries: a sample of what clients search for, for ``gateway compare --queries``. Imported only when one is on."""
