"""The models of the tests of the API, made in the replicas' processes."""

from __future__ import annotations

from collections.abc import Callable

from gateway.backends.fake import fake_info
from gateway.config.model_entry import ModelEntry
from gateway.config.settings import Settings
from tests.api.conftest import MODELS, RandomBackend

MAKE = "tests.cluster.contract_models:make"


def make(entry: ModelEntry, _settings: Settings, _on_card_lost: Callable[[str], None]) -> RandomBackend:
    """Return the backend of the model with this id."""
    return RandomBackend(fake_info(entry.id, **MODELS[entry.id]))
