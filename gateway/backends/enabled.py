"""The place where models run, which of them are enabled there, and in which order this machine loads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from gateway.config.registry import ModelEntry
from gateway.errors import LicenseNotAccepted

_ON_THE_CPU = "(`enabled: true` in models.yaml runs it on the CPU)"
_USUAL = f"no accelerator is present {_ON_THE_CPU}"
_SWITCHED_OFF = "switched off in models.yaml (`enabled: false`)"
USUAL_REASONS = (_SWITCHED_OFF, _USUAL)
"""Reasons for a disabled model that need no warning, because nothing is wrong."""


class Site(Protocol):
    """The place where models run, other than upstream servers."""

    def why_disabled(self, entry: ModelEntry) -> str:
        """Return the reason why a model is disabled there; empty if it is enabled. May block.

        Raises:
            StartError: there is no such place.
        """

    def is_here(self, entry: ModelEntry) -> bool:
        """Return whether the model shares this machine's memory with the others, so that they load one after another."""

    def is_kept_elsewhere(self, entry: ModelEntry) -> bool:
        """Return whether older gateways there serve another version of the model, and must do so until this one can."""


class Here:
    """This process, as the :class:`Site` of models."""

    def why_disabled(self, entry: ModelEntry) -> str:
        return why_disabled(entry)

    def is_here(self, entry: ModelEntry) -> bool:
        return not entry.is_remote

    def is_kept_elsewhere(self, entry: ModelEntry) -> bool:
        return False


def load_order(entries: Sequence[ModelEntry]) -> list[ModelEntry]:
    """Return the models of this process in loading order, so that no model waits for another's download.

    First the models of installed packages, which are small, then those with checkpoints on this machine, then those to
    be downloaded, and last those loaded on demand, which are only described.
    """
    from gateway.engine.checkpoint.sources import is_cached

    def rank(entry: ModelEntry) -> tuple[bool, bool, bool]:
        return entry.is_on_demand, not is_cached(entry), entry.parsed_source.kind != "package"

    return sorted(entries, key=rank)


def why_disabled(entry: ModelEntry) -> str:
    """Return the reason why a model is disabled on this machine; empty if it is enabled.

    Imports torch only if the answer depends on it.
    """
    if entry.enabled is False:
        return _SWITCHED_OFF
    if entry.enabled == "auto" and not entry.is_remote:
        why_no_card = _why_no_card("auto" if entry.device == "cpu" else entry.device)
        return why_no_card or _why_not_fetched(entry)
    return ""


def _why_not_fetched(entry: ModelEntry) -> str:
    """Return the reason why an entry forbids the download of its checkpoint; empty if it is allowed or not needed."""
    from gateway.engine.checkpoint.sources import is_cached, require_license

    try:
        require_license(entry, entry.license or "")
    except LicenseNotAccepted as error:
        return "" if is_cached(entry) else str(error)
    return ""


def _why_no_card(setting: str) -> str:
    """Return the reason why a value of ``device`` gets no card on this machine; empty if it gets one."""
    from gateway.engine.cards import read_machine

    machine = read_machine()
    if machine.is_unsure:
        from gateway.engine.devices import see_cards  # imports torch

        machine = see_cards()
    obstacle = machine.obstacle_to(setting)
    if obstacle is None:
        return ""
    return f"{obstacle} {_ON_THE_CPU}" if setting == "auto" else str(obstacle)
