"""Pages for people: the state of the models, their differences and their quality. Imported only if the console is on."""
