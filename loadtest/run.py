"""``make loadtest``: start a gateway if none is named, load it with locust, and end it.

    python -m loadtest.run                                         smoke, against a separate gateway
    python -m loadtest.run --host http://gpu:8000 --models jina-embeddings-v3,bge-m3 --load-profile knee

Every option is locust's or one of ``loadtest/options.py``.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence

from bench.processes import ROOT
from bench.servers import Server, clean_environ, free_port

_LOCUSTFILE = ROOT / "loadtest" / "locustfile.py"
_DEFAULT_MODEL = "all-minilm-l6-v2"


def locust_command(arguments: Sequence[str]) -> list[str]:
    """Return the command that runs locust without its web page."""
    return [sys.executable, "-m", "locust", "-f", str(_LOCUSTFILE), "--headless", "--only-summary", *arguments]


@contextlib.contextmanager
def own_gateway() -> Iterator[str]:
    """Serve ``models.yaml`` on a free port while the context lasts; gives the URL."""
    port = free_port()
    command = [sys.executable, "-m", "gateway", "serve", "--port", str(port)]
    environ = {"GATEWAY_LOG_LEVEL": "warning"}
    with Server(
        "loadtest-gateway",
        command,
        port=port,
        ready="/health/ready",
        path="/v1/embeddings",
        model=_DEFAULT_MODEL,
        environ=environ,
    ):
        yield f"http://127.0.0.1:{port}"


def main(arguments: Sequence[str]) -> int:
    """Run a load test; return locust's exit code: 0 when every limit held, 1 when one did not."""
    names = {argument.partition("=")[0] for argument in arguments}
    with contextlib.ExitStack() as stack:
        given = list(arguments)
        if not names & {"--host", "-H", "--target"}:
            given += ["--host", stack.enter_context(own_gateway())]
        if not names & {"--models", "--target"}:
            given += ["--models", _DEFAULT_MODEL]
        return subprocess.run(locust_command(given), env=clean_environ(), cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
