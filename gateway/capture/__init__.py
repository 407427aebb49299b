"""Captured queries: a sample of the clients' queries for ``gateway compare --queries``. Imported only if a capture is on."""
