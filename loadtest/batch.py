"""A batch of the Batches API that runs while other things fail: is every line answered exactly once?"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass

import httpx
import numpy as np
import orjson
from numpy.typing import NDArray

from loadtest.answers import Checker, WrongAnswer
from loadtest.faults import MODEL

_ENDED = frozenset({"completed", "failed", "expired", "cancelled"})
_TEXTS = [f"passage {i} of a batch, " * (1 + i % 5) for i in range(97)]
_TEXTS_PER_LINE = 8


@dataclass(frozen=True, slots=True)
class BatchOutcome:
    """The results of the lines.

    Attributes:
        failures: lines that were answered with an error, by status and code.
        problems: lines without an answer, with several, or with wrong vectors.
    """

    num_lines: int
    answered: int
    failures: Counter[str]
    problems: Sequence[str]


class RunningBatch:
    """Uploads lines and starts a batch of them. Begins before any fault: the vectors of that time are right."""

    def __init__(self, url: str, num_lines: int) -> None:
        self._client = httpx.Client(base_url=f"{url}/v1", timeout=120)
        self._texts = {
            f"line-{i}": [_TEXTS[(i + j) % len(_TEXTS)] for j in range(_TEXTS_PER_LINE)] for i in range(num_lines)
        }
        alone = self._client.post("/embeddings", json={"model": MODEL, "input": _TEXTS}).raise_for_status().json()
        self._golden = {
            text: np.array(item["embedding"], np.float32) for text, item in zip(_TEXTS, alone["data"], strict=True)
        }
        lines = [
            orjson.dumps(
                {
                    "custom_id": name,
                    "method": "POST",
                    "url": "/v1/embeddings",
                    "body": {"model": MODEL, "input": texts, "encoding_format": "base64"},
                }
            )
            for name, texts in self._texts.items()
        ]
        form = {"file": ("requests.jsonl", b"\n".join(lines))}
        file = self._client.post("/files", files=form, data={"purpose": "batch"}).raise_for_status().json()
        asked = {"input_file_id": file["id"], "endpoint": "/v1/embeddings", "completion_window": "24h"}
        self._id = self._client.post("/batches", json=asked).raise_for_status().json()["id"]

    def finish(self, patience_s: float) -> BatchOutcome:
        """Wait for the end of the batch, and check its files."""
        with closing(self._client):
            return self._finish(patience_s)

    def _finish(self, patience_s: float) -> BatchOutcome:
        deadline = time.monotonic() + patience_s
        batch = {"status": "unknown"}
        while batch["status"] not in _ENDED and time.monotonic() < deadline:
            with suppress(httpx.HTTPError):
                batch = self._client.get(f"/batches/{self._id}").raise_for_status().json()
            time.sleep(0.2)
        if batch["status"] != "completed":
            return BatchOutcome(len(self._texts), 0, Counter(), [f"the batch is {batch['status']}"])
        files = [batch[name] for name in ("output_file_id", "error_file_id") if batch[name]]
        pages = [self._client.get(f"/files/{name}/content").raise_for_status().content for name in files]
        return check([orjson.loads(line) for page in pages for line in page.splitlines()], self._texts, self._golden)


def check(
    lines: Sequence[Mapping[str, object]],
    texts: Mapping[str, Sequence[str]],
    golden: Mapping[str, NDArray[np.float32]],
) -> BatchOutcome:
    """Check that the lines of the output and error files answer each request exactly once, and rightly.

    Args:
        texts: of each request, by its ``custom_id``.
        golden: the right vector of each text.
    """
    checker = Checker(golden=golden)
    times = Counter(str(line["custom_id"]) for line in lines)
    failures: Counter[str] = Counter()
    problems = [f"{name} has no answer" for name in texts if not times[name]]
    problems += [f"{name} has {count} answers" for name, count in times.items() if count > 1 or name not in texts]
    answered = 0
    for line in lines:
        response = line["response"]
        if not isinstance(response, dict) or response["status_code"] != 200:
            failures[_cause(response)] += 1
            continue
        try:
            checker.check(texts.get(str(line["custom_id"]), ()), orjson.dumps(response["body"]), {})
            answered += 1
        except WrongAnswer as error:
            problems.append(f"{line['custom_id']}: {error}")
    return BatchOutcome(len(texts), answered, failures, problems)


def _cause(response: object) -> str:
    if not isinstance(response, dict):
        return "no response"
    return f"{response['status_code']} {response['body']['error']['code']}"
