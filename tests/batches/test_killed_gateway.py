"""A whole gateway that is killed in the middle of a batch, and started again."""

from __future__ import annotations

import base64
import json
import signal
import time
from pathlib import Path

import numpy as np
from openai import OpenAI
from openai.types import Batch

from tests.clients.gateway_process import MODEL, gateway_to_kill, running_gateway

NUM_LINES = 800
_LIMIT_S = 120


def requests() -> bytes:
    lines = []
    for i in range(NUM_LINES):
        body = {"model": MODEL, "input": f"text {i} of a batch " * (1 + i % 5), "encoding_format": "base64"}
        body |= {"dimensions": -1} if i % 100 == 50 else {}  # these fail
        lines.append({"custom_id": f"r{i}", "method": "POST", "url": "/v1/embeddings", "body": body})
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def wait_for(client: OpenAI, batch: Batch, number: int) -> Batch:
    """Wait until so many lines of a batch are answered."""
    deadline = time.monotonic() + _LIMIT_S
    while True:
        batch = client.batches.retrieve(batch.id)
        assert batch.status in ("validating", "in_progress", "finalizing", "completed"), batch.errors
        counts = batch.request_counts
        done = counts.completed + counts.failed if counts else 0
        if done >= number and (number < NUM_LINES or batch.status == "completed"):
            return batch
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_gateway_that_is_killed_in_the_middle_of_a_batch_continues_it(tmp_path: Path) -> None:
    folder = str(tmp_path / "batches")
    with gateway_to_kill(tmp_path, GATEWAY_BATCH_DIR=folder) as (gateway, process):
        client = OpenAI(base_url=gateway.base_url, api_key="any")
        file = client.files.create(file=("requests.jsonl", requests()), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
        before = wait_for(client, batch, 1)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert before.status == "in_progress"
    with running_gateway(tmp_path, GATEWAY_BATCH_DIR=folder) as gateway:
        client = OpenAI(base_url=gateway.base_url, api_key="any")
        after = wait_for(client, batch, NUM_LINES)
        assert after.output_file_id is not None
        assert after.error_file_id is not None
        output = [json.loads(line) for line in client.files.content(after.output_file_id).iter_lines()]
        errors = [json.loads(line) for line in client.files.content(after.error_file_id).iter_lines()]
        alone = client.embeddings.create(model=MODEL, input="text 7 of a batch " * 3).data[0].embedding

    failed = [f"r{i}" for i in range(50, NUM_LINES, 100)]
    assert [line["custom_id"] for line in errors] == failed
    assert [line["custom_id"] for line in output] == [f"r{i}" for i in range(NUM_LINES) if f"r{i}" not in failed]
    assert after.request_counts is not None
    assert (after.request_counts.completed, after.request_counts.failed) == (NUM_LINES - len(failed), len(failed))
    content = output[7]["response"]["body"]["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(content), "<f4"), alone, atol=1e-5)
