"""Pages for people: what answers, how models differ, which is better. Imported only where the console is switched on."""
