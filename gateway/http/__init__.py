"""The HTTP layer that all APIs share: connections, bodies, limits, and the single exit for errors."""
