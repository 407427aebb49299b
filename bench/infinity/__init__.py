"""Programs for the environment of Infinity's own server, which is separate from the gateway's."""
