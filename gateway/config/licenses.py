"""Recognize licenses that must be accepted before weights are downloaded."""

from __future__ import annotations

import re

# `CC BY-NC 4.0`, `cc-by-nc-sa-4.0`, `sarashina-non-commercial`, `research-only`
_NO_COMMERCIAL_USE = re.compile(
    r"(?<![a-z])nc(?![a-z])|non[-_ ]?commercial|research[-_ ](only|use)|(?<![a-z])rail(?![a-z])-nc"
)


def forbids_commercial_use(license_name: str) -> bool:
    """Return whether the name of a license shows that commercial use is not allowed.

    Args:
        license_name: the name in ``models.yaml`` or on the model card, such as ``cc-by-nc-4.0``; empty if unknown.
    """
    return _NO_COMMERCIAL_USE.search(license_name.lower()) is not None
