"""Vector stores as sources and sinks, a module for each. A store's client is imported only when the store is used."""
