"""Forecast how a model would run here, without loading or downloading anything."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.config.registry import ModelEntry
from gateway.engine.checkpoint.hub import HubRefusal, describe
from gateway.engine.checkpoint.sizes import Attention
from gateway.engine.checkpoint.sources import is_cached, is_whole, require_license, require_readable
from gateway.engine.devices import (
    available_bytes,
    choose_devices,
    choose_dtype,
    device_notes,
    leave_out_full,
    others_on,
)
from gateway.engine.loading import plan_load
from gateway.engine.memory import MemoryPlan, Shape, estimate_memory, require_memory
from gateway.engine.model.choose import choose_runtime
from gateway.engine.placement import MAX_BATCH_TOKENS
from gateway.errors import LoadError
from gateway.types import ModelInfo

_HUB_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Forecast:
    """A forecast of how a model would run.

    Attributes:
        info: the model's info; ``None`` before its checkpoint has been downloaded.
        runtime: the runtime that would compute the forward.
        memory: the memory needed on each device; ``None`` if it is known only after the download.
        download_bytes: size of the download, 0 for none; ``None`` if the hub does not say. Of an interrupted download, only
            the rest counts.
        download_note: the reason why the size is not from the hub, if it is not.
        is_refused: the hub has answered, but refuses access to the repository.
        license: the license of the weights; empty if unknown.
        notes: remarks for an operator about the devices.
    """

    devices: tuple[str, ...]
    dtype: str
    runtime: str
    info: ModelInfo | None = None
    memory: MemoryPlan | None = None
    download_bytes: int | None = 0
    download_note: str = ""
    is_refused: bool = False
    license: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Known:
    """Published sizes, rounded, of a checkpoint that has not been downloaded."""

    shape: Shape
    model_type: str
    max_tokens: int
    download_bytes: int


# The two models in `models.yaml` that come from the hub.
_KNOWN = {
    "jinaai/jina-embeddings-v3-hf": _Known(
        Shape(572_000_000, 1024, 4096, Attention(16, 1024)),
        "jina_embeddings_v3",
        8192,
        1_200_000_000,
    ),
    "BAAI/bge-m3": _Known(Shape(568_000_000, 1024, 4096, Attention(16, 1024)), "xlm-roberta", 8192, 2_300_000_000),
}


class Forecaster:
    """Forecasts models one after the other; each gets the memory that the earlier ones leave.

    Models that are loaded on demand come last. Each may use all of the memory that the models loaded at the start leave.
    """

    def __init__(self) -> None:
        self._free: dict[str, int] = {}
        self._on_demand: dict[str, int] = {}

    def forecast(self, entry: ModelEntry) -> Forecast:
        """Return how a model of this process would run here.

        Raises:
            LoadError: the checkpoint cannot be served, or does not fit.
            LicenseNotAccepted: the license forbids commercial use, and the entry does not accept that.
        """
        require_readable(entry)
        found = _planned(entry) if is_whole(entry) or entry.parsed_source.kind != "hub" else _not_downloaded(entry)
        if found.memory is not None:
            for device in found.devices:
                free = self.free_bytes(device)
                others = others_on(device) if found.memory.total_bytes > free else ""
                require_memory(found.memory, free, device, others)
            for device in found.devices:
                if entry.is_on_demand:
                    self._on_demand[device] = self._on_demand.get(device, 0) + found.memory.total_bytes
                else:
                    self._free[device] -= found.memory.total_bytes
        return found

    def excesses(self) -> dict[str, tuple[int, int]]:
        """Return the devices on which the models that are loaded on demand do not fit together.

        The values are the bytes that these models need together, and the bytes that they may share.
        """
        free = {device: self.free_bytes(device) for device in self._on_demand}
        return {device: (need, free[device]) for device, need in self._on_demand.items() if need > free[device]}

    def free_bytes(self, device: str) -> int:
        """Return the memory of a device that is not assigned to a model yet."""
        if device not in self._free:
            self._free[device] = available_bytes(device)
        return self._free[device]


def _planned(entry: ModelEntry) -> Forecast:
    plan = plan_load(entry, may_download=False)
    license_name = entry.license or ""
    return Forecast(
        plan.devices, plan.dtype, plan.runtime, plan.info, plan.memory, license=license_name, notes=plan.notes
    )


def _not_downloaded(entry: ModelEntry) -> Forecast:
    known = _KNOWN.get(entry.source)
    size, note = None if known is None else known.download_bytes, ""
    is_refused = False
    license_name = entry.license or ""
    has_weights = is_cached(entry)  # then only small files are downloaded
    if not has_weights:
        require_license(entry, license_name)
    try:
        repository = describe(entry.source, entry.revision or "", _HUB_TIMEOUT_S)
    except LoadError as error:
        note, is_refused = str(error), isinstance(error, HubRefusal)
    else:
        if not has_weights:
            require_license(entry, repository.license)
        size, license_name = repository.missing_bytes, license_name or repository.license
    devices = choose_devices(entry.device)
    dtype = choose_dtype(entry.dtype, devices[0])
    runtime = choose_runtime(entry.runtime, devices[0], dtype, known.model_type if known else "")
    memory = None
    if known is not None:
        max_batch_tokens = entry.max_batch_tokens or MAX_BATCH_TOKENS[devices[0].partition(":")[0]]
        max_tokens = entry.max_tokens or known.max_tokens
        memory = estimate_memory(known.shape, dtype, runtime, max_tokens, max_batch_tokens, devices[0])
        devices = leave_out_full(entry.device, devices, memory.total_bytes)
    return Forecast(
        devices,
        dtype,
        runtime,
        memory=memory,
        download_bytes=size,
        download_note=note,
        is_refused=is_refused,
        license=license_name,
        notes=device_notes(entry.device, devices),
    )
