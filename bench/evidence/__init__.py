"""How often conclusions are wrong: simulations of comparisons and experiments whose truth is known."""
