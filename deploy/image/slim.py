"""Make a virtual environment smaller, for an image: remove the files that the gateway does not use.

python deploy/image/slim.py .venv               do it
python deploy/image/slim.py .venv --dry-run     only say how much each step would save

Run by `Dockerfile`, in the stage whose result is copied. It needs `strip` (binutils), for symbols of libraries that only
debuggers read. The files are deleted: use it on an environment that nothing else uses.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MB = 1e6


@dataclass(frozen=True)
class Step:
    """Files and folders that go, relative to site-packages."""

    reason: str
    patterns: tuple[str, ...]


STEPS = (
    Step("bytecode; compile_used.py creates it again for the modules in use", ("**/__pycache__",)),
    Step("tests of packages", ("**/tests",)),
    Step(
        "C++ headers, tests and tools of torch",
        (
            *("torch/include", "torch/share", "torch/test", "torch/bin/test_*", "torch/bin/*Test", "torch/bin/protoc*"),
            *("torch/lib/*_test.so", "torch/lib/libbackend_with_compiler.so"),
        ),
    ),
    Step("C++ headers of OpenVINO", ("openvino/include", "openvino/cmake")),
    # The gateway uses OpenVINO on CPUs, for models of torch.
    Step(
        "OpenVINO for other devices",
        (
            "openvino/libs/libopenvino_intel_gpu_plugin.so*",
            "openvino/libs/libopenvino_intel_npu_*",
            "openvino/libs/cache.json",
        ),
    ),
    Step(
        "OpenVINO's readers of other formats",
        tuple(
            f"openvino/libs/libopenvino_{name}_frontend.so*"
            for name in ("onnx", "tensorflow", "tensorflow_lite", "paddle", "gguf")
        ),
    ),
    Step("pip", ("pip", "pip-*.dist-info")),
)
# Libraries with a table of symbols, of wheels that bring no libraries from elsewhere: strip breaks those that auditwheel has
# moved, such as OpenBLAS.
STRIPPED = (
    "torch/lib/libtorch_cpu.so",
    "torch/lib/libtorch_python.so",
    *(
        f"{name}/**/*.so"
        for name in ("aiohttp", "hf_xet", "multidict", "regex", "tiktoken", "tokenizers", "uvloop", "yaml", "zstandard")
    ),
)


def main() -> None:
    """Remove, strip, and print the bytes that each step saved."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("environment", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="change nothing")
    options = parser.parse_args()
    (packages,) = options.environment.glob("lib/python3.*/site-packages")
    print(f"{size(packages) / MB:8.1f} MB before")
    for step in STEPS:
        saved = 0
        for path in matches(packages, step.patterns):
            saved += size(path)
            if not options.dry_run:
                remove(path)
        print(f"{-saved / MB:8.1f} MB {step.reason}")
    saved = sum(strip(path, dry_run=options.dry_run) for path in matches(packages, STRIPPED))
    print(f"{-saved / MB:8.1f} MB symbols of libraries")
    print(f"{size(packages) / MB:8.1f} MB after")


def matches(packages: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    """Yield the files and folders that match, sorted; a folder without the matches in it."""
    found = sorted({path for pattern in patterns for path in packages.glob(pattern)})
    last: Path | None = None
    for path in found:
        if last is None or not path.is_relative_to(last):
            last = path
            yield path


def size(path: Path) -> int:
    """Return the bytes in a file or a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())


def remove(path: Path) -> None:
    """Remove a file or a folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def strip(path: Path, *, dry_run: bool) -> int:
    """Take the symbols out of a library; return the bytes that this saves. The file is replaced, not written to."""
    smaller = path.with_suffix(".smaller")
    if shutil.which("strip") is None:
        sys.exit("slim.py needs strip: apt-get install binutils")
    subprocess.run(["strip", "--strip-unneeded", "-o", smaller, path], check=True)
    saved = size(path) - size(smaller)
    if dry_run or saved <= 0:
        smaller.unlink()
    else:
        shutil.copymode(path, smaller)
        smaller.replace(path)
    return saved


if __name__ == "__main__":
    main()
