"""Outcomes of experiments: kept in SQLite, joined with the exposures, and compared arm by arm."""
