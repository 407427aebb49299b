"""Clients that need versions of libraries which the gateway's own environment does not have.

``worker.py`` and ``calls.py`` run in the environments of ``build/clients`` and import nothing of the project's.
"""
