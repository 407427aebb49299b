"""The routes of all dialects."""

from __future__ import annotations

from fastapi import APIRouter

from gateway.access.keyring import Keyring
from gateway.access.memory import MemoryBudget
from gateway.api.assignments import assignments_router
from gateway.api.batches import batches_router, make_runner
from gateway.api.classify import classify_router
from gateway.api.comparisons import Comparisons, comparisons_router
from gateway.api.data_sets import data_sets_router
from gateway.api.duels import duels_router
from gateway.api.endpoint import Endpoint
from gateway.api.experiment_changes import experiment_changes_router, operators_changes_router
from gateway.api.experiments import Experiments, experiments_router
from gateway.api.files import files_router
from gateway.api.grading import grading_router
from gateway.api.ollama import ollama_router
from gateway.api.openai import openai_router
from gateway.api.outcomes import outcomes_router
from gateway.api.rerank import rerank_router
from gateway.api.spaces import spaces_router
from gateway.api.tei import tei_router
from gateway.api.tokenize import tokenize_router
from gateway.deployment import Deployment
from gateway.outcomes.keeper import Keeper


def client_routers(endpoint: Endpoint, deployment: Deployment) -> list[APIRouter]:
    """Return the routes that compute something, and those that describe spaces."""
    return [
        openai_router(endpoint),
        rerank_router(endpoint),
        classify_router(endpoint),
        tokenize_router(endpoint),
        tei_router(endpoint),
        ollama_router(endpoint),
        spaces_router(deployment),
    ]


def experiment_routers(endpoint: Endpoint, experiments: Experiments, keeper: Keeper | None) -> list[APIRouter]:
    """Return the routes of experiments, except those of the operator."""
    return [
        assignments_router(endpoint),  # before the experiments, whose ids may hold a slash
        experiment_changes_router(endpoint),
        outcomes_router(endpoint, experiments, keeper),
        experiments_router(experiments),
    ]


def operator_routers(endpoint: Endpoint, comparisons: Comparisons) -> list[APIRouter]:
    """Return the operator's routes that need more than the deployment; see :func:`gateway.api.admin.admin_router`."""
    return [
        operators_changes_router(endpoint),
        comparisons_router(comparisons),
        data_sets_router(comparisons),
        duels_router(endpoint, comparisons.duels),
        grading_router(endpoint, comparisons),
    ]


def batch_routers(endpoint: Endpoint, keyring: Keyring, memory: MemoryBudget) -> list[APIRouter]:
    """Return the routes of files and batches, which all answer 404 without a folder for them.

    Raises:
        StartError: the folder cannot be used.
    """
    runner = make_runner(endpoint, keyring, memory)
    has_keys = bool(keyring)
    return [files_router(runner, has_keys=has_keys), batches_router(endpoint, runner, has_keys=has_keys)]
