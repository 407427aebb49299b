"""The routes of all dialects."""

from __future__ import annotations

from fastapi import APIRouter

from gateway.access.keyring import Keyring
from gateway.access.memory import MemoryBudget
from gateway.api.batches import batches_router, make_runner
from gateway.api.classify import classify_router
from gateway.api.endpoint import Endpoint
from gateway.api.files import files_router
from gateway.api.ollama import ollama_router
from gateway.api.openai import openai_router
from gateway.api.rerank import rerank_router
from gateway.api.spaces import spaces_router
from gateway.api.tei import tei_router
from gateway.deployment import Deployment


def client_routers(endpoint: Endpoint, deployment: Deployment) -> list[APIRouter]:
    """Return the routes that compute something, and those that describe spaces."""
    return [
        openai_router(endpoint),
        rerank_router(endpoint),
        classify_router(endpoint),
        tei_router(endpoint),
        ollama_router(endpoint),
        spaces_router(deployment),
    ]


def batch_routers(endpoint: Endpoint, keyring: Keyring, memory: MemoryBudget) -> list[APIRouter]:
    """Return the routes of files and batches, which all answer 404 without a folder for them.

    Raises:
        StartError: the folder cannot be used.
    """
    runner = make_runner(endpoint, keyring, memory)
    has_keys = bool(keyring)
    return [files_router(runner, has_keys=has_keys), batches_router(endpoint, runner, has_keys=has_keys)]
