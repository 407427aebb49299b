"""The HTTP of the gateway that no API has for itself: connections, bodies, limits, the one exit for errors."""
