"""Child processes of a benchmark: each is ended by its process id, even after an error."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Self

import orjson

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"

_STOP_S = 15.0


class Process:
    """A child process; as a context manager it is ended on the way out.

    It is in its own process group, so that Ctrl-C reaches only the benchmark, which then ends it.

    Args:
        name: of the log, ``bench/results/NAME.log``.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        environ: Mapping[str, str],
        *,
        stdin: int = subprocess.DEVNULL,
        stdout: int | None = None,
    ) -> None:
        RESULTS.mkdir(exist_ok=True)
        self.log = RESULTS / f"{name}.log"
        with self.log.open("wb") as log:
            self.popen = subprocess.Popen(
                command,
                cwd=ROOT,
                env=dict(environ),
                stdin=stdin,
                stdout=log if stdout is None else stdout,
                stderr=log,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.popen.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_details: object) -> None:
        self.end()

    def check_alive(self) -> None:
        """Raise ``RuntimeError`` with the end of the log if the process has ended by itself."""
        if self.popen.poll() is not None:
            raise RuntimeError(f"{self.log.stem} ended with {self.popen.returncode}:\n{self.log_tail()}")

    def log_tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])

    def end(self) -> None:
        """Ask the process to stop, and kill it if it does not."""
        self.popen.terminate()
        try:
            self.popen.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()


class Worker(Process):
    """A Python module in a separate process, which answers each line of JSON with a line of JSON."""

    def __init__(self, name: str, module: str, arguments: Sequence[str], environ: Mapping[str, str]) -> None:
        super().__init__(
            name,
            [sys.executable, "-m", module, *arguments],
            environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def ask(self, question: object) -> Any:
        """Send a question and wait for the answer."""
        stdin, stdout = self.popen.stdin, self.popen.stdout
        assert stdin is not None  # noqa: S101  both are pipes
        assert stdout is not None  # noqa: S101
        stdin.write(orjson.dumps(question) + b"\n")
        stdin.flush()
        return self._read(stdout)

    def end(self) -> None:
        """Ask the process to stop, kill it if it does not, and close its pipes."""
        super().end()
        for pipe in (self.popen.stdin, self.popen.stdout):
            if pipe is not None:
                pipe.close()

    def _read(self, stdout: IO[bytes]) -> Any:
        line = stdout.readline()
        if not line:
            self.popen.wait(_STOP_S)
            self.check_alive()
        return orjson.loads(line)


@contextmanager
def bounded(limit_s: int) -> Iterator[None]:
    """End the block in order when the time is up, or when the process gets SIGTERM."""

    def stop(number: int, _frame: object) -> None:
        raise SystemExit(f"stopped by {signal.Signals(number).name}")

    signal.signal(signal.SIGALRM, stop)
    signal.signal(signal.SIGTERM, stop)
    signal.alarm(limit_s)
    try:
        yield
    finally:
        signal.alarm(0)
