"""The vendored file is the one that its publisher published."""

from __future__ import annotations

import hashlib

from tests.console.conftest import AXE

# Of `axe.min.js` in https://registry.npmjs.org/axe-core/-/axe-core-4.14.1.tgz, MPL-2.0.
SHA256 = "29348999450cdf2849a8e70b7912fc2da85a849da39c0d0d5394f51d4a9ed95c"


def test_axe_core_is_the_published_file() -> None:
    assert hashlib.sha256(AXE.read_bytes()).hexdigest() == SHA256
