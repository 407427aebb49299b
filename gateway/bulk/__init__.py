"""Embed many texts: from files and stores into files and stores, each row exactly once. Imported when used."""
