"""Unmodified clients against a real gateway: its process, a socket, the bundled model.

What is tested is what people install. The one client that isn't run is LiteLLM: it pins ``openai<3`` (as of 1.106.2),
and openai-python, Mem0, LangChain and LlamaIndex are tested here with openai 3. One environment can't hold both, and
with openai held back, the others would be tested with a library that new installations don't get. ``test_litellm.py``
sends the request bodies that LiteLLM was recorded sending, and checks the fields that it reads.
"""
