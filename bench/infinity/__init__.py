"""Programs for the environment of Infinity's own server, which is not ours."""
