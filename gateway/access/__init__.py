"""Access control: ``keyring`` identifies clients, ``quotas`` counts their requests, ``memory`` bounds them all."""
