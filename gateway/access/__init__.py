"""Who may ask, how much, and how slowly: ``keyring`` knows the clients, ``quotas`` counts, ``body`` reads within limits."""
