"""Unmodified clients against a real gateway: its process, a socket, the bundled model.

What is tested is what people install, in the versions that new installations get. One environment cannot hold all of it:
LiteLLM takes no openai 3, infinity_client no httpx 0.28. ``apart`` runs those in environments of their own, and ``node`` is
for Node.
"""
