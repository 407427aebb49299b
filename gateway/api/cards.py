"""The graphics cards of this machine, with the other processes on them, for the operator: ``GET /admin/cards``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, Field

from gateway.api.live import LiveCard
from gateway.api.wire import AnswerBody
from gateway.engine.cards import find_obstacle, read_torch
from gateway.engine.nvml import Card, Failure, read_driver, visible_cards


class CardProcess(BaseModel):
    """Another process that uses a card."""

    pid: int
    name: str
    memory_bytes: int | None = Field(description="Memory that it uses; `null` if the driver does not report it.")


class CardOfMachine(BaseModel):
    """A graphics card of the machine, or a slice of one."""

    index: int = Field(description="Its number in `nvidia-smi`.")
    device: str | None = Field(
        description="Its name for `device` in models.yaml; `null` if this process may not use it."
    )
    name: str
    uuid: str
    total_bytes: int | None
    free_bytes: int | None = Field(description="Memory that no process uses.")
    allocated_bytes: int | None = Field(description="Memory that the tensors of this process use.")
    busy: float | None = Field(description="Fraction of the last sample period in which the card computed.")
    others: list[CardProcess] = Field(description="The other processes on it.")
    problem: str | None = Field(description="Reason why models cannot use it.")


class CardList(AnswerBody):
    """The cards, in the order of the PCI bus."""

    object: Literal["list"] = "list"
    driver: str | None = Field(description="Version of the driver; `null` without one.")
    problem: str | None = Field(description="Reason why the driver does not respond.")
    data: list[CardOfMachine]


def find_cards(live: Mapping[str, LiveCard], environ: Mapping[str, str] = os.environ) -> CardList:
    """Ask the driver about all cards. Takes some milliseconds: call it in a thread.

    Args:
        live: the figures of the cards that this process uses, by device.
    """
    driver = read_driver()
    if isinstance(driver, Failure):
        return CardList(driver=None, problem=driver.message, data=[])
    visible = visible_cards(driver.cards, environ.get("CUDA_VISIBLE_DEVICES"))
    devices = {card.uuid: f"cuda:{number}" for number, card in enumerate(visible)}
    torch = read_torch()
    return CardList(
        driver=driver.version,
        problem=None,
        data=[
            _describe(card, device, live.get(device or ""), str(find_obstacle(card, torch) or "") or None)
            for card in driver.cards
            for device in (devices.get(card.uuid),)
        ],
    )


def _describe(card: Card, device: str | None, live: LiveCard | None, problem: str | None) -> CardOfMachine:
    return CardOfMachine(
        index=card.index,
        device=device,
        name=card.name,
        uuid=card.uuid,
        total_bytes=card.total_bytes or None,
        free_bytes=card.free_bytes if card.total_bytes else None,
        allocated_bytes=live.allocated_bytes if live else None,
        busy=live.busy if live else None,
        others=[CardProcess(pid=other.pid, name=other.name, memory_bytes=other.memory_bytes) for other in card.others],
        problem=problem,
    )
