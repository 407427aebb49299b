"""Which models are enabled on this machine, and in which order they are loaded."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.config.registry import ModelEntry
from gateway.errors import LicenseNotAccepted

_ON_THE_CPU = "(`enabled: true` in models.yaml runs it on the CPU)"
_USUAL = f"no accelerator is present {_ON_THE_CPU}"
_SWITCHED_OFF = "switched off in models.yaml (`enabled: false`)"
USUAL_REASONS = (_SWITCHED_OFF, _USUAL)
"""Reasons why a model is disabled that need no warning: there is nothing to be mended."""


def load_order(entries: Sequence[ModelEntry]) -> list[ModelEntry]:
    """Return models of this process in the order of their loads, so that none waits for gigabytes of another one.

    First those of installed packages, which are small, then those whose checkpoints are on this machine, then those that
    are downloaded; at last those that are loaded on demand, which only takes a description.
    """
    from gateway.engine.checkpoint.sources import is_cached

    def rank(entry: ModelEntry) -> tuple[bool, bool, bool]:
        return entry.is_on_demand, not is_cached(entry), entry.parsed_source.kind != "package"

    return sorted(entries, key=rank)


def why_disabled(entry: ModelEntry) -> str:
    """Return why a model is disabled on this machine; empty if it is enabled.

    Imports torch only if the answer depends on it.
    """
    if entry.enabled is False:
        return _SWITCHED_OFF
    if entry.enabled == "auto" and not entry.is_remote:
        why_no_card = _why_no_card("auto" if entry.device == "cpu" else entry.device)
        return why_no_card or _why_not_fetched(entry)
    return ""


def _why_not_fetched(entry: ModelEntry) -> str:
    """Return why the checkpoint of a model may not be downloaded, as far as its entry says; empty if it may, or is here."""
    from gateway.engine.checkpoint.sources import is_cached, require_license

    try:
        require_license(entry, entry.license or "")
    except LicenseNotAccepted as error:
        return "" if is_cached(entry) else str(error)
    return ""


def _why_no_card(setting: str) -> str:
    """Return why a setting of ``device`` gets no card on this machine; empty if it gets one."""
    from gateway.engine.cards import read_machine

    machine = read_machine()
    if machine.is_unsure:
        from gateway.engine.devices import see_cards  # imports torch

        machine = see_cards()
    obstacle = machine.obstacle_to(setting)
    if obstacle is None:
        return ""
    return f"{obstacle} {_ON_THE_CPU}" if setting == "auto" else str(obstacle)
