"""Comparisons that are read from a folder, and started from a page or over HTTP."""
