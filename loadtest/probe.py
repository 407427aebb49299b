"""Ask the servers for their models before the load, and their queues during it."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gevent
import httpx
import numpy as np
import orjson
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families

from loadtest.answers import Checker
from loadtest.options import Options
from loadtest.plan import Target

log = logging.getLogger("loadtest")

_EVERY_S = 1.0
_TIMEOUT_S = 10.0
QUEUE_METRIC = "gateway_queue_texts"
# What identifies a model among what /v1/models says of it.
_IDENTITY = ("id", "space", "revision", "dtype", "device", "runtime", "max_tokens", "dimensions")


@dataclass(slots=True)
class Probe:
    """Asks in the background, once a second.

    Attributes:
        queues: (seconds since the epoch, model, texts that wait there).
    """

    options: Options
    queues: list[tuple[float, str, float]] = field(default_factory=list)
    models: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    _greenlet: gevent.Greenlet | None = None

    def start(self) -> None:
        """Ask for the models, and begin to watch."""
        self.models = {target.label: self._describe(target) for target in self.options.targets}
        if self.options.metrics_url and self._greenlet is None:
            self._greenlet = gevent.spawn(self._watch)

    @property
    def registry_hash(self) -> str:
        """A hash of the targets, as 12 hex digits, which is the same for the same models in the same precision."""
        return hashlib.sha256(orjson.dumps(self.models, option=orjson.OPT_SORT_KEYS)).hexdigest()[:12]

    def _describe(self, target: Target) -> Mapping[str, Any]:
        try:
            url = f"{target.url}{target.path.removesuffix('/embeddings')}/models"
            answer = httpx.get(url, headers=headers(self.options), timeout=_TIMEOUT_S).json()
            found = next(model for model in answer["data"] if model["id"] == target.model)
        except (httpx.HTTPError, ValueError, KeyError, StopIteration):
            return {"id": target.model}  # another kind of server, or an alias
        return {name: found[name] for name in _IDENTITY if name in found}

    def _watch(self) -> None:
        with httpx.Client(headers=headers(self.options), timeout=_TIMEOUT_S) as client:
            while True:
                try:
                    self._read(client.get(self.options.metrics_url).raise_for_status().text)
                except (httpx.HTTPError, ValueError) as error:
                    log.info("no metrics at %s: %s", self.options.metrics_url, error)
                    return
                gevent.sleep(_EVERY_S)

    def _read(self, text: str) -> None:
        now = time.time()
        for family in text_string_to_metric_families(text):
            if family.name == QUEUE_METRIC:
                self.queues += [(now, sample.labels.get("model", ""), sample.value) for sample in family.samples]


def headers(options: Options) -> dict[str, str]:
    """Return the headers of every request."""
    return {"authorization": f"Bearer {options.api_key}"} if options.api_key else {}


def golden_vectors(target: Target, options: Options, texts: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """Ask for the vector of each text alone, one after the other.

    Vectors depend on the task: all are asked for without one, so such a run sends none.

    Raises:
        SystemExit: the server does not give them.
    """
    golden = {}
    with httpx.Client(headers=headers(options), timeout=60) as client:
        for text in texts:
            body = {"model": target.model, "input": [text], "encoding_format": options.encoding}
            answer = client.post(f"{target.url}{target.path}", json=body)
            if answer.status_code != 200:
                raise SystemExit(f"loadtest: {target.label} gives no golden vectors: {answer.text[:300]}")
            golden[text] = Checker().check([text], answer.content, {}).vectors[0]
    return golden
