"""``gateway doctor``: look at the machine, the hub and the registry, and say what to do."""
