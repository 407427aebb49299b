"""An embedding gateway: several embedding models behind one OpenAI-style endpoint."""

__version__ = "0.1.0"
