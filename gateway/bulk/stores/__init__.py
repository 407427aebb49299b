"""Vector stores as sources and sinks. A store's client library is imported only when the store is used."""
