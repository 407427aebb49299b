"""Measure the files of an image, from what ``docker export`` or ``podman export`` writes, and compare them with a limit.

::

    docker create --name measured embedding-gateway:0.1.0-cpu
    docker export measured | python3 deploy/image/size.py

Unlike the size that ``docker image inspect`` reports, this does not depend on whether Docker stores images compressed.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
from typing import BinaryIO

LIMIT_MB = 1200
"""For the CPU image: what deploy/README.md says, and what a change may not exceed without being noticed."""


def size_mb(archive: BinaryIO) -> int:
    """Return the MB (a million bytes) of an archive's files, rounded up.

    Raises:
        tarfile.ReadError: it is not a complete archive.
    """
    with tarfile.open(fileobj=archive, mode="r|") as members:
        num_bytes = sum(member.size for member in members if member.isreg())
    return -(-num_bytes // 1_000_000)


def main() -> int:
    """Print the size of the archive on standard input; return 1 if it is over the limit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--limit-mb", type=int, default=LIMIT_MB, help="in millions of bytes")
    limit_mb = parser.parse_args().limit_mb
    found_mb = size_mb(sys.stdin.buffer)
    if found_mb > limit_mb:
        print(
            f"the image has {found_mb} MB of files; the limit is {limit_mb} MB. `docker history` shows the layer that grew; "
            f"slim.py removes files that the gateway does not use",
            file=sys.stderr,
        )
        return 1
    print(f"{found_mb} MB of files; the limit is {limit_mb} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
