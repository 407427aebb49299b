"""A language model that grades the documents that the arms find, and the check of its grades by people."""
