"""Run the batches of a folder with answers that take a moment, until all have ended: a process to be killed.

python killed_runner.py FOLDER
"""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path

import orjson

from gateway.batches.lines import Answered, Line
from gateway.batches.runner import Runner
from gateway.batches.store import Store
from gateway.batches.values import Batch, LineError


class Slow:
    """Answers each request with its own text, and every tenth with an error."""

    max_line_bytes = 10_000
    is_paused = False

    def read(self, _endpoint: str, line: bytes) -> Line:
        content = orjson.loads(line)
        return Line(content["custom_id"], "model", orjson.dumps(content["body"]))

    def refusal(self, _batch: Batch) -> LineError | None:
        return None

    async def answer(self, _batch: Batch, line: Line) -> Answered:
        await asyncio.sleep(random.random() * 0.004)
        return Answered(400 if line.custom_id.endswith("7") else 200, "req-1", line.body, 1)


async def main(folder: Path) -> None:
    runner = Runner(Store(folder, 1 << 30), Slow())
    runner.start()
    while runner.num_open("someone"):  # noqa: ASYNC110  the process does nothing else
        await asyncio.sleep(0.01)
    await runner.stop()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
