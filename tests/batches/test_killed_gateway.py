"""A whole gateway that is killed at chosen moments of a batch, and started again."""

from __future__ import annotations

import base64
import json
import signal
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai import OpenAI
from openai.types import Batch

from tests.clients.gateway_process import MODEL, gateway_to_kill, running_gateway

pytestmark = pytest.mark.slow

NUM_LINES = 800
_FEW = 60
_LIMIT_S = 120


def requests(num_lines: int = NUM_LINES) -> bytes:
    lines = []
    for i in range(num_lines):
        body = {"model": MODEL, "input": f"text {i} of a batch " * (1 + i % 5), "encoding_format": "base64"}
        body |= {"dimensions": -1} if i % 100 == 50 else {}  # these fail
        lines.append({"custom_id": f"r{i}", "method": "POST", "url": "/v1/embeddings", "body": body})
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def counts_of(batch: Batch) -> int:
    """Return the number of lines of a batch."""
    return batch.request_counts.total if batch.request_counts else 0


def wait_for(client: OpenAI, batch: Batch, number: int) -> Batch:
    """Wait until so many lines of a batch are answered."""
    deadline = time.monotonic() + _LIMIT_S
    while True:
        batch = client.batches.retrieve(batch.id)
        assert batch.status in ("validating", "in_progress", "finalizing", "completed"), batch.errors
        counts = batch.request_counts
        done = counts.completed + counts.failed if counts else 0
        if done >= number and (number < counts_of(batch) or batch.status == "completed"):
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


class Database:
    """The database of batches, which another process uses."""

    def __init__(self, folder: Path) -> None:
        self._files = folder / "files"
        self._db = sqlite3.connect(folder / "batches.sqlite3", timeout=0, isolation_level=None)

    def hold(self, before: int, status: str) -> bool:
        """Wait until the next batch has a status, and from then on keep the gateway from changing it.

        Args:
            before: the number of earlier batches.

        Returns:
            Whether the batch was seen in this status.
        """
        deadline = time.monotonic() + _LIMIT_S
        while time.monotonic() < deadline:
            try:
                self._db.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:  # the gateway writes
                continue
            batches = self.batches()
            if len(batches) > before and batches[-1]["status"] == status:
                return status != "in_progress" or self._has_more(batches[-1])
            self._db.execute("ROLLBACK")
            if len(batches) > before and batches[-1]["status"] == "completed":
                return False
            time.sleep(0.0002)
        raise AssertionError(f"no batch is {status} after {_LIMIT_S} s")

    def _has_more(self, batch: dict[str, Any]) -> bool:
        """Wait until the output has answers that the database does not count yet."""
        output = self._files / batch["output_id"]
        deadline = time.monotonic() + _LIMIT_S
        while not (output.exists() and output.stat().st_size > batch["output_bytes"]):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return True

    def batches(self) -> list[dict[str, Any]]:
        return [json.loads(data) for (data,) in self._db.execute("SELECT data FROM batches ORDER BY seq")]

    def close(self) -> None:
        self._db.close()


def kill_at(status: str, folder: Path, tmp_path: Path) -> None:
    """Start a gateway, begin a batch, and kill the gateway while the batch has this status."""
    with (
        gateway_to_kill(tmp_path, GATEWAY_BATCH_DIR=str(folder)) as (gateway, process),
        closing(Database(folder)) as database,
        ThreadPoolExecutor(1) as pool,
    ):
        client = OpenAI(base_url=gateway.base_url, api_key="any", max_retries=0)
        file = client.files.create(file=("requests.jsonl", requests(_FEW)), purpose="batch")
        while True:
            before = len(database.batches())
            adding = pool.submit(
                client.batches.create, input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h"
            )
            is_held = database.hold(before, status)
            if is_held:
                process.send_signal(signal.SIGKILL)
                process.wait()
            assert is_held or adding.result()  # the kill may be before the answer
            if is_held:
                return


def test_a_gateway_that_is_killed_in_any_state_of_a_batch_answers_each_line_once(tmp_path: Path) -> None:
    folder = tmp_path / "batches"
    folder.mkdir()
    for status in ("validating", "in_progress", "finalizing"):
        kill_at(status, folder, tmp_path)
    with running_gateway(tmp_path, GATEWAY_BATCH_DIR=str(folder)) as gateway:
        client = OpenAI(base_url=gateway.base_url, api_key="any")
        batches = list(client.batches.list(limit=100))
        assert len(batches) >= 3
        for batch in batches:
            after = wait_for(client, batch, _FEW)
            assert after.status == "completed"
            assert after.output_file_id is not None
            assert after.error_file_id is not None
            output = [json.loads(line) for line in client.files.content(after.output_file_id).iter_lines()]
            errors = [json.loads(line) for line in client.files.content(after.error_file_id).iter_lines()]
            assert [line["custom_id"] for line in errors] == ["r50"]
            assert [line["custom_id"] for line in output] == [f"r{i}" for i in range(_FEW) if i != 50]
        known = {file.id for file in client.files.list(limit=1000)}
    assert {path.name for path in (folder / "files").iterdir()} == known
