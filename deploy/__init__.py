"""How the gateway is deployed and watched."""
