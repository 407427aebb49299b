"""Compile the modules that a gateway uses: load the bundled model, compute its golden vectors, import the server.

Run by `Dockerfile` with the environment of the image, after slim.py: it fails if that removed too much. The bytecode does
not depend on the times of the sources, which a copy could change.
"""

from __future__ import annotations

import importlib
import py_compile
import sys
from pathlib import Path

MODEL = "all-minilm-l6-v2"
SERVING = (
    "gateway.app",
    "gateway.server",
    "uvicorn.loops.uvloop",
    "uvicorn.protocols.http.httptools_impl",
    "limits.aio",
)


def main() -> None:
    """Use, then compile."""
    from gateway.cli.main import main as gateway

    sys.argv = ["gateway", "verify", MODEL]
    try:
        gateway()
    except SystemExit as ended:
        if ended.code:
            raise
    for name in SERVING:
        importlib.import_module(name)
    names = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    files = {Path(name) for name in names if name}
    compiled = [file for file in sorted(files) if file.suffix == ".py" and "site-packages" in file.parts]
    for file in compiled:
        py_compile.compile(str(file), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH, doraise=True)
    print(f"compiled {len(compiled)} modules")


if __name__ == "__main__":
    main()
