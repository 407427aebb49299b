"""The description that a replica needs, without a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.backends.fake import fake_info
from gateway.cluster.placing import Spec, actor_options, make_spec, scaling_options
from gateway.config.model_entry import ModelEntry
from gateway.config.settings import Settings
from gateway.errors import LoadError
from tests.hub import COMMIT
from tests.peers import find_module


def entry_of(**fields: object) -> ModelEntry:
    values = {"id": "mini", "source": "./mini", "replicas": {"max": 2, "min": 1}, **fields}
    return ModelEntry.model_validate(values)


def spec_of(has_cards: bool = False, settings: Settings | None = None, **fields: object) -> Spec:
    return make_spec(entry_of(**fields), settings or Settings(), has_cards=has_cards)


@pytest.mark.parametrize("field", ["golden", "ranges"])
@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "No such file"), (b"\xff", "is not UTF-8: invalid start byte at byte 1")],
    ids=["missing", "not UTF-8"],
)
def test_a_file_that_cannot_be_sent_is_an_error_of_its_model_that_names_it(
    tmp_path: Path, field: str, content: bytes | None, problem: str
) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text("{}")
    if content is not None:
        bad.write_bytes(content)
    files = {"golden": str(good), "ranges": str(good), field: str(bad)}

    with pytest.raises(LoadError, match=problem) as refused:
        spec_of(**files)

    assert str(refused.value).startswith(f"{bad}: ")


def test_the_name_of_a_deployment_changes_only_with_settings_that_its_vectors_depend_on(tmp_path: Path) -> None:
    golden = tmp_path / "golden.json"
    golden.write_text("{}")
    name = spec_of(golden=str(golden)).name
    assert name.startswith("gateway-mini-")

    assert spec_of(golden=str(golden), required=True, replicas={"max": 5, "min": 1}).name == name
    of_no_effect = {"license_accepted": True, "allow_space_change": True, "license": "MIT", "enabled": "auto"}
    for field, value in {**of_no_effect, "load": "on_demand", "cache": {"max_bytes": 2**21}}.items():
        assert spec_of(golden=str(golden), **{field: value}).name == name, field
    golden.write_text("{ }")
    assert spec_of(golden=str(golden)).name != name
    golden.write_text("{}")
    assert spec_of(golden=str(golden), dtype="float32").name != name
    assert spec_of(golden=str(golden), settings=Settings(max_queue_texts=7)).name != name
    assert spec_of(golden=str(golden), has_cards=True).name != name
    assert spec_of(golden=str(golden), settings=Settings(port=7)).name == name
    assert spec_of(golden=str(golden), settings=Settings(log_level="debug")).name == name


def test_a_name_has_only_characters_that_a_file_name_may_have() -> None:
    assert spec_of(id="owner/mini.v1_x").name.startswith("gateway-owner-mini.v1_x-")


@pytest.mark.parametrize(
    ("has_cards", "device", "gpus", "num_gpus", "asked"),
    [
        (False, "auto", None, 0, "cpu"),
        (True, "auto", None, 1, "auto"),
        (True, "cpu", None, 0, "cpu"),
        (True, "cuda:1", None, 1, "cuda"),  # Ray chooses the card
        (True, "auto", 0, 0, "cpu"),
        (False, "auto", 1, 1, "auto"),
    ],
)
def test_a_replica_gets_a_card_or_a_core(
    has_cards: bool,
    device: str,
    gpus: int | None,
    num_gpus: int,
    asked: str,
) -> None:
    replicas = {"min": 1, "max": 2, **({} if gpus is None else {"gpus": gpus})}

    spec = spec_of(has_cards, device=device, replicas=replicas, load="on_demand")

    assert (spec.num_gpus, spec.entry.device) == (num_gpus, asked)
    assert spec.entry.load == "eager"
    assert actor_options(spec) == ({"num_gpus": 1, "num_cpus": 0.1} if num_gpus else {"num_gpus": 0, "num_cpus": 1})


def test_replicas_are_a_number_or_scaled_between_two() -> None:
    assert scaling_options(spec_of(replicas={"min": 3, "max": 3}), "policy") == {"num_replicas": 3}
    apart = scaling_options(spec_of(replicas={"min": 2, "per_node": 1}), "policy")
    assert apart == {"num_replicas": 2, "max_replicas_per_node": 1}
    assert scaling_options(spec_of(replicas={"max": 2, "per_node": 1}), "policy")["max_replicas_per_node"] == 1
    scaled = scaling_options(spec_of(replicas={"min": 1, "max": 4, "target_requests": 7}), "policy")[
        "autoscaling_config"
    ]
    assert (scaled["min_replicas"], scaled["max_replicas"], scaled["target_ongoing_requests"]) == (1, 4, 7)
    # What was asked long ago neither keeps replicas nor adds any.
    assert scaled["upscale_delay_s"] <= scaled["look_back_period_s"] < scaled["downscale_delay_s"]


@pytest.mark.parametrize(
    ("entry", "accepts"),
    [({}, False), ({"license_accepted": True}, True), ({"enabled": True}, True), ({"enabled": "auto"}, False)],
    ids=str,
)
def test_a_replica_accepts_no_license_that_the_registry_does_not(entry: dict[str, object], accepts: bool) -> None:
    jina = {"source": "jinaai/jina-embeddings-v3-hf", "revision": COMMIT, "license": "CC BY-NC 4.0"}

    assert spec_of(**jina, **entry).entry.accepts_license is accepts


def test_a_replica_that_cannot_use_its_card_is_refused_and_says_why() -> None:
    find_module("ray")
    from gateway.cluster.replica import require_card

    old = "on the CPU, because an NVIDIA GeForce RTX 3090 is here, but driver 550 is too old"
    with pytest.raises(
        LoadError, match="mini has reserved a graphics card, but would run on the CPU, because an NVIDIA"
    ):
        require_card(spec_of(True), fake_info("mini", device="cpu", notes=(old,)))
    require_card(spec_of(True), fake_info("mini", device="cuda:0", notes=("other processes hold 20.0 GiB of cuda:0",)))
    require_card(spec_of(True), fake_info("mini", device="cpu"))  # static embeddings, which run on no card
    require_card(spec_of(True, device="cpu"), fake_info("mini", device="cpu", notes=(old,)))
