"""``gateway doctor``: check the machine, the hub and the registry, and recommend the next steps."""
