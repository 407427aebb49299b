"""The deployment of a model's replicas: its name, resources, and the data that a replica needs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gateway import __version__
from gateway.config.files import read_bounded
from gateway.config.model_entry import ModelEntry
from gateway.config.replicas import Replicas
from gateway.config.settings import Settings
from gateway.errors import LoadError

LOCAL: Final = "local"
"""The address of a cluster that starts and ends with this process."""
PREFIX: Final = "gateway-"
"""The prefix of all deployments' names."""
MAKE_INFINITY: Final = "gateway.cluster.replica:make_infinity"
_MAX_FILE_BYTES: Final = 64 * 2**20
# Fields of an entry that name files. Their contents are sent along, because a replica's machine may not have them.
_FILES: Final = ("golden", "ranges")
# Fields that do not affect a replica.
_NOT_THE_MODEL: Final = {
    *("required", "allow_space_change", "license", "license_accepted", "replicas"),
    *("enabled", "load", "idle_unload_s", "cache"),
}
# Settings that a replica's engine reads; none is a key.
_SETTINGS: Final = (
    "max_queue_texts",
    "max_queue_tokens",
    "forward_timeout_s",
    "golden_interval_s",
    "cpu_threads",
    "cache_dir",
    "log_level",
)
# A gateway with another level needs no separate replicas; they log at the level of the gateway that deployed them.
_NOT_THE_ENGINE: Final = {"log_level"}
# The seconds that autoscaling waits before it adds or removes a replica.
UPSCALE_DELAY_S: Final = 5.0
DOWNSCALE_DELAY_S: Final = 120.0
LOOK_BACK_S: Final = 12.0


@dataclass(frozen=True, slots=True)
class Spec:
    """Everything that a replica must know about its model.

    Attributes:
        files: the contents of the entry's files, by field name.
        make_backend: ``module:function`` that makes the backend from the entry and the settings.
        version: the version of the deploying gateway; another version may compute or read different values.
    """

    entry: ModelEntry
    settings: Settings
    files: Mapping[str, str]
    make_backend: str
    version: str
    num_gpus: int

    @property
    def name(self) -> str:
        """The name of its deployment: the model's id, and a hash of everything else that its replicas depend on."""
        content = {
            "entry": self.entry.model_dump(mode="json", exclude=_NOT_THE_MODEL),
            "settings": self.settings.model_dump(mode="json", include=set(_SETTINGS) - _NOT_THE_ENGINE),
            "files": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in self.files.items()},
            "backend": self.make_backend,
            "version": self.version,
            "gpus": self.num_gpus,
        }
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
        return f"{stem_of_model(self.entry.id)}-{digest}"

    @property
    def replicas(self) -> Replicas:
        return self.entry.replicas or Replicas()


def stem_of(name: str) -> str:
    """Return the part of a deployment's name that identifies the model, without the hash."""
    return name.rpartition("-")[0]


def stem_of_model(model_id: str) -> str:
    """Return the same part for a model's id: in characters that Serve accepts, also in the names of Ray's log files."""
    return f"{PREFIX}{re.sub(r'[^A-Za-z0-9._-]', '-', model_id)}"


def make_spec(entry: ModelEntry, settings: Settings, *, has_cards: bool, make_backend: str = MAKE_INFINITY) -> Spec:
    """Return everything that a replica must know about its model.

    Args:
        has_cards: the cluster has graphics cards.

    Raises:
        LoadError: a file of the entry cannot be read.
    """
    files = {name: _read(path) for name, path in _file_paths(entry).items()}
    requested = entry.replicas.gpus if entry.replicas is not None else None
    wants_card = has_cards and entry.device != "cpu" if requested is None else bool(requested)
    # Ray chooses the card, and the replica sees only that one.
    device = "cuda" if wants_card and entry.device.startswith("cuda:") else entry.device
    # `enabled` stays: `true` accepts a license, which `auto` does not.
    changes: dict[str, Any] = {"device": device if wants_card else "cpu", "load": "eager"}
    return Spec(
        entry=entry.model_copy(update=changes),
        settings=Settings(**settings.model_dump(include=set(_SETTINGS))),
        files=files,
        make_backend=make_backend,
        version=__version__,
        num_gpus=int(wants_card),
    )


def _read(path: str) -> str:
    try:
        return read_bounded(Path(path), _MAX_FILE_BYTES).decode()
    except OSError as error:
        raise LoadError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise LoadError(f"{path}: is not UTF-8: {error.reason} at byte {error.start + 1}") from error


def _file_paths(entry: ModelEntry) -> dict[str, str]:
    return {name: path for name in _FILES if (path := getattr(entry, name)) is not None}


def actor_options(spec: Spec) -> dict[str, Any]:
    """Return the resources that Ray reserves for a replica: a card, or a core for a model that runs on the CPU."""
    return {"num_gpus": spec.num_gpus, "num_cpus": 0.1 if spec.num_gpus else 1}


def scaling_options(spec: Spec, policy: object) -> dict[str, Any]:
    """Return how many replicas Ray Serve runs, and how many of them on one machine.

    Args:
        policy: the function by which Ray scales, as an ``AutoscalingPolicy``.
    """
    replicas = spec.replicas
    apart = {} if replicas.per_node is None else {"max_replicas_per_node": replicas.per_node}
    if replicas.most == replicas.min:
        return {"num_replicas": replicas.min, **apart}
    return {
        **apart,
        "autoscaling_config": {
            "min_replicas": replicas.min,
            "max_replicas": replicas.most,
            "target_ongoing_requests": replicas.target_requests,
            "look_back_period_s": LOOK_BACK_S,
            "upscale_delay_s": UPSCALE_DELAY_S,
            "downscale_delay_s": DOWNSCALE_DELAY_S,
            "policy": policy,
        },
    }
