"""Load for the gateway with locust: how fast it is, which model is faster, and where it breaks."""
