"""The gateway without a model: everything but the forward is its own, the vectors are ready-made.

python -m bench.fake_gateway PORT
"""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np

from gateway.backends.fake import FakeBackend, fake_info
from gateway.config.registry import ModelEntry, Registry
from gateway.config.settings import Settings
from gateway.deployment import Deployment
from gateway.server import serve
from gateway.telemetry.logs import configure_logs
from gateway.types import Embeddings, EmbedJob

MODEL = "fake"
WIDTH = 1024


class RandomBackend(FakeBackend):
    """A fake whose numbers take as long to write as those of a model: the fake's own are mostly zeros."""

    def __init__(self) -> None:
        super().__init__(fake_info(MODEL, WIDTH))
        self._vectors = np.random.default_rng(0).standard_normal((4096, WIDTH), dtype=np.float32)

    async def embed(self, job: EmbedJob) -> Embeddings:
        embeddings = await super().embed(job)
        return replace(embeddings, vectors=self._vectors[: len(job.texts)])


def main() -> None:
    settings = Settings(port=int(sys.argv[1]))
    entry = ModelEntry(id=MODEL, source="package:fake/model", enabled=True)
    registry = Registry(path=settings.models, version=1, models=(entry,), aliases={})
    configure_logs(settings.log_level, settings.log_format)
    deployment = Deployment(registry, settings, make_backend=lambda _entry: RandomBackend())
    serve(deployment, lambda _addresses, _has_keys: None)


if __name__ == "__main__":
    main()
