"""The gateway's deployment and monitoring."""
