"""The routes of all dialects."""

from __future__ import annotations

from fastapi import APIRouter

from gateway.api.classify import classify_router
from gateway.api.endpoint import Endpoint
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
