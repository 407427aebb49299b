"""A replica in a separate process, which has its own metrics: run as a script, it prints its place as JSON, and serves."""

from __future__ import annotations

import asyncio
import json
import secrets
import sys

from gateway.backends.fake import FakeBackend, fake_info
from gateway.cluster.host import Host
from gateway.telemetry import metrics


async def serve(name: str, num_batches: int) -> None:
    """Serve until the process is ended.

    Args:
        num_batches: the batches that it has computed, by its metrics.
    """
    info = fake_info("mini", 8)
    backend = FakeBackend(info)
    await backend.start()
    secret = secrets.token_bytes(32)
    host = Host(backend, info, secret, "127.0.0.1")
    await host.start()
    for _ in range(num_batches):
        metrics.BATCH_TEXTS.labels("mini").observe(4)
    place: dict[str, object] = {"id": name, "host": "127.0.0.1", "port": host.port, "secret": secret.hex()}
    place |= {"fingerprint": info.fingerprint, "node": "n1", "device": "cuda:0"}
    sys.stdout.write(json.dumps(place) + "\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], int(sys.argv[2])))
