"""``gateway experiments ID --outcomes FILE``: a CSV file by hand, and the files of several replicas together."""

from __future__ import annotations

import gzip
import math
import os
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gateway.cli.main import app
from gateway.config.registry import Experiment, load_registry
from gateway.errors import StartError
from gateway.experiments.exposures import Exposure, ExposureLog, iso
from gateway.experiments.split import Split, declaration_of, hash_of_declaration
from gateway.outcomes.files import report_files
from gateway.outcomes.joining import signed
from gateway.outcomes.reading import read_csv
from gateway.outcomes.store import NewOutcome, Store
from gateway.outcomes.verdicts import branches_of

REGISTRY = """\
version: 1
models:
  - {id: one, source: ./one}
  - {id: two, source: ./two}
experiments:
  - id: exp
    kind: cross_space
    unit: {from: [body:user]}
    exclude: [staff]
    outcome: {name: kept, margin: 0.05}
    arms:
      - {model: one, weight: 1}
      - {name: second, model: two, weight: 1}
"""
UNITS = [f"user-{i}" for i in range(400)]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    path = tmp_path / "models.yaml"
    path.write_text(REGISTRY, encoding="utf-8")
    return path


@pytest.fixture
def experiment(models: Path) -> Experiment:
    return load_registry(models, {}).experiments[0]


def exposures_of(experiment: Experiment, units: list[str], seconds: float = 100.0) -> list[Exposure]:
    split, declared = Split(experiment), hash_of_declaration(*declaration_of(experiment))
    return [
        Exposure(
            iso(seconds),
            "exp",
            split.generation,
            arm.label,
            split.hash_of(unit),
            arm.model,
            "s@0",
            0.5,
            "body:user",
            declared=declared,
        )
        for unit in units
        for arm in [split.arm_of(unit)]
    ]


def write_log(path: Path, exposures: list[Exposure]) -> Path:
    log = ExposureLog(path, 10**7, 1)
    for exposure in exposures:
        log.write(exposure)
    log.close()
    return path


def write_csv(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["experiments", *map(str, arguments)])
    assert not isinstance(result.exception, Exception), result.exception
    bare = "".join(" " if char in "│┃┏┓┗┛┡┩┳╇┴━─├┤┼└┘┌┐" else char for char in result.stdout)
    return result.exit_code, " ".join(bare.split()), result.stderr


def test_a_csv_file_is_compared_by_hand(models: Path, experiment: Experiment, tmp_path: Path) -> None:
    split = Split(experiment)
    log = write_log(tmp_path / "x.jsonl", exposures_of(experiment, UNITS))
    second = [unit for unit in UNITS if split.arm_of(unit).label == "second"]
    kept = [*second[::2], "stranger", "staff"]
    csv = write_csv(tmp_path / "kept.csv", "unit,value", *(f"{unit},1" for unit in kept))

    (report,) = report_files(experiment, [log], [csv]).outcomes
    status, printed, errors = run("exp", "--models", models, "--exposures", log, "--outcomes", csv)

    num, num_second, num_kept = len(UNITS), len(second), len(second[::2])
    mean = num_kept / num
    expected = (num_kept * (1 - mean) - (num_second - num_kept) * mean + (num - num_second) * mean) / 0.5 / num
    (comparison,) = report.comparisons
    assert comparison.estimate == pytest.approx(expected)
    assert (report.outcomes, report.unmatched) == (num_kept + 1, 1)  # the excluded one is not read
    assert [(arm.units, arm.units_with_outcome) for arm in report.arms] == [
        (num - num_second, 0),
        (num_second, num_kept),
    ]
    assert comparison.verdict == "better"
    assert (status, errors) == (0, "")
    assert f"outcome kept (per unit, more is better, margin 0.05): {num_kept + 1} posted" in printed
    assert "not counted: 1 from units that were not in any arm before" in printed
    assert f"second {num_second} {num_kept} {num_kept / num_second:.4g} " in printed
    assert f"second against one: better, difference +{expected:.4g} (" in printed


def test_not_yet_says_how_many_units_and_when_to_look_again(
    models: Path, experiment: Experiment, tmp_path: Path
) -> None:
    log = write_log(tmp_path / "x.jsonl", exposures_of(experiment, UNITS, seconds=time.time() - 86_400))
    csv = write_csv(tmp_path / "kept.csv", "unit,value", *(f"{unit},1" for unit in UNITS[::3]))

    _, printed, _ = run("exp", "--models", models, "--exposures", log, "--outcomes", csv)

    assert "second against one: not yet, difference " in printed
    assert "; 400 units, and about " in printed
    assert " find a difference of the margin: look again on 20" in printed


def helped(experiment: Experiment) -> list[str]:
    """Return units whose outcomes show a clear difference."""
    return [unit for unit in UNITS if Split(experiment).arm_of(unit).label == "second"][::2]


def changed(experiment: Experiment, **fields: object) -> Experiment:
    content = experiment.model_dump()
    return Experiment.model_validate({**content, "outcome": {**content["outcome"], **fields}})


@pytest.mark.parametrize("change", [{"name": "clicks"}, {"margin": 0.5}, {"better": "less"}, {"per": "mean"}])
def test_an_outcome_that_is_chosen_when_its_result_is_known_gets_no_verdict(
    experiment: Experiment, tmp_path: Path, change: dict[str, object]
) -> None:
    """As in a running gateway: of twenty outcomes, or of several margins, one shows a difference by chance."""
    log = write_log(tmp_path / "x.jsonl", exposures_of(experiment, UNITS))
    rows = [f"{unit},1,{name}" for unit in helped(experiment) for name in ("kept", "clicks")]
    csv = write_csv(tmp_path / "x.csv", "unit,value,name", *rows)

    late = report_files(changed(experiment, **change), [log], [csv]).outcomes[0].comparisons[0]
    declared = report_files(experiment, [log], [csv]).outcomes[0].comparisons[0]

    assert late.verdict is None
    assert late.reason.startswith("`outcome` in models.yaml was changed by 20")
    assert f"after {len(rows) // 2} of its outcomes had been posted: change it back, or count again" in late.reason
    assert "with a column `time`, later outcomes are recognized" in late.reason
    assert declared.verdict == "better"


@pytest.mark.parametrize(("seconds", "verdict"), [(199, None), (201, "better")])
def test_a_change_before_all_outcomes_is_accepted(
    experiment: Experiment, tmp_path: Path, seconds: int, verdict: str | None
) -> None:
    """The exposure log tells when: the first declaration from 100 s on, the second from 200 s on."""
    late = changed(experiment, margin=0.5)
    exposures = [*exposures_of(experiment, UNITS[:-1]), *exposures_of(late, UNITS[-1:], 200)]
    log = write_log(tmp_path / "x.jsonl", exposures)
    rows = [f"{unit},1,1970-01-01T00:0{seconds // 60}:{seconds % 60:02}Z" for unit in helped(experiment)]
    csv = write_csv(tmp_path / "x.csv", "unit,value,time", *rows)

    comparison = report_files(late, [log], [csv]).outcomes[0].comparisons[0]

    assert comparison.verdict == verdict
    assert verdict or "was changed by 1970-01-01, after " in comparison.reason
    assert "column" not in comparison.reason


@pytest.mark.parametrize(("minute", "verdict"), [(59, None), (61, "better")])
def test_a_log_that_began_before_it_named_declarations_says_nothing_about_the_time_before(
    experiment: Experiment, tmp_path: Path, minute: int, verdict: str | None
) -> None:
    """The outcome of the first hour may have been chosen when its result was known."""
    before = [replace(exposure, declared=None) for exposure in exposures_of(experiment, UNITS[:-1])]
    log = write_log(tmp_path / "x.jsonl", [*before, *exposures_of(experiment, UNITS[-1:], 3600)])
    rows = [f"{unit},1,1970-01-01T0{minute // 60}:{minute % 60:02}:00Z" for unit in helped(experiment)]
    csv = write_csv(tmp_path / "x.csv", "unit,value,time", *rows)

    comparison = report_files(experiment, [log], [csv]).outcomes[0].comparisons[0]

    assert comparison.verdict == verdict
    known = f"the declared `outcome` is known only since 1970-01-01, and {len(rows)} of its outcomes may have been"
    assert verdict or comparison.reason.startswith(known)


@pytest.mark.parametrize(("change", "verdict"), [({}, "better"), ({"margin": 0.5}, None)])
def test_counts_that_begin_in_the_past_make_no_later_declaration_earlier(
    experiment: Experiment, tmp_path: Path, change: dict[str, object], verdict: str | None
) -> None:
    since = {"counts_from": datetime.fromtimestamp(50, UTC)}
    again = Experiment.model_validate({**changed(experiment, **change).model_dump(), **since})
    exposures = [*exposures_of(experiment, UNITS[:-1]), *exposures_of(again, UNITS[-1:], 7200)]
    log = write_log(tmp_path / "x.jsonl", exposures)
    rows = [f"{unit},1,1970-01-01T01:00:00Z" for unit in helped(experiment)]
    csv = write_csv(tmp_path / "x.csv", "unit,value,time", *rows)

    comparison = report_files(again, [log], [csv]).outcomes[0].comparisons[0]

    assert comparison.verdict == verdict
    assert verdict or comparison.reason.startswith(
        f"`outcome` in models.yaml was changed by 1970-01-01, after {len(rows)}"
    )


def test_units_in_two_arms_give_no_verdict(experiment: Experiment, tmp_path: Path) -> None:
    """For example, from files that were edited; under other weights, a unit may be in another arm."""
    exposures = exposures_of(experiment, UNITS)
    others = [replace(one, arm="second", model="two") for one in exposures if one.arm != "second"][:3]
    earlier = [replace(one, generation="before00") for one in others]
    csv = write_csv(tmp_path / "x.csv", "unit,value", *(f"{unit},1" for unit in helped(experiment)))

    good, bad = (
        report_files(experiment, [write_log(tmp_path / f"{i}.jsonl", logged)], [csv]).outcomes[0].comparisons[0]
        for i, logged in enumerate(([*earlier, *exposures], [*exposures, *others]))
    )

    assert good.verdict == "better"
    assert bad.verdict is None
    assert bad.reason.startswith("3 of the units are in two arms under the same weights")


def test_files_that_do_not_say_what_was_declared_give_no_verdict(experiment: Experiment, tmp_path: Path) -> None:
    exposures = [replace(exposure, declared=None) for exposure in exposures_of(experiment, UNITS)]
    log = write_log(tmp_path / "x.jsonl", exposures)
    csv = write_csv(tmp_path / "x.csv", "unit,value", *(f"{unit},1" for unit in helped(experiment)))

    comparison = report_files(experiment, [log], [csv]).outcomes[0].comparisons[0]

    assert (comparison.verdict, comparison.estimate is None) == (None, False)
    assert comparison.reason.startswith("the files do not say which `outcome` was declared while the units arrived")


def test_the_files_of_several_replicas_are_united(experiment: Experiment, tmp_path: Path) -> None:
    """Units in both, outcomes at the replica that has not seen the unit, and one that was posted to both."""
    split = Split(experiment)
    paths = []
    for number, units in enumerate((UNITS[:250], UNITS[200:])):
        path = tmp_path / f"{number}.sqlite3"
        store = Store(path, 10**8)
        store.declare("exp", branches_of(experiment, split.generation))
        store.expose([(one, 100.0 + number) for one in exposures_of(experiment, units)])
        posted = [*UNITS[number * 100 : number * 100 + 50], "user-399"]
        rows = [
            NewOutcome("kept", unit.encode()[:16].ljust(16), signed(split.hash_of(unit)), 1, 1, 200, False)
            for unit in posted
        ]
        store.keep("exp", rows)
        store.close()
        paths.append(path)

    (report,) = report_files(experiment, paths, []).outcomes

    assert (report.outcomes, report.unmatched) == (101, 0)
    assert sum(arm.units for arm in report.arms) == 400
    assert sum(arm.units_with_outcome for arm in report.arms) == 101


def test_an_id_in_two_files_with_another_value_is_named(experiment: Experiment, tmp_path: Path) -> None:
    first = write_csv(tmp_path / "a.csv", "unit,value,id", "ada,1,1", "ada,1,2")
    second = write_csv(tmp_path / "b.csv", "unit,value,id", "ada,1,1", "ada,0,2")

    with pytest.raises(StartError, match=r"b.csv:3: `id` is also in .*/a.csv:3, with another unit or value: give each"):
        report_files(experiment, [], [first, second])
    (report,) = report_files(experiment, [], [first, first]).outcomes
    assert report.outcomes == 2


def test_an_outcome_of_two_replicas_counts_as_first_posted_and_another_with_its_id_is_reported(
    experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The earlier one is from before the exposure, so whichever file is read first, it does not count."""
    split = Split(experiment)
    log = write_log(tmp_path / "x.jsonl", exposures_of(experiment, UNITS[:2]))
    units = [signed(split.hash_of(unit)) for unit in UNITS[:2]]
    paths = []
    for number, seconds in enumerate((90.0, 200.0)):
        store = Store(tmp_path / f"{number}.sqlite3", 10**8)
        store.keep("exp", [NewOutcome("kept", b"sent twice      ", units[0], 1, 1, seconds, False)])
        store.keep("exp", [NewOutcome("kept", b"another         ", units[1], number, 1, 150 + seconds, False)])
        store.close()
        paths.append(store.path)

    for order in (paths, paths[::-1]):
        (report,) = report_files(experiment, [log], order).outcomes
        assert (report.outcomes, report.unmatched) == (2, 1)
        assert sum(arm.mean or 0 for arm in report.arms) == 0  # the first one of `another`
        shown = capsys.readouterr()
        assert "outcomes_with_the_id_of_another" in shown.out + shown.err


def test_an_outcome_counts_if_the_clock_of_its_replica_is_a_little_behind(
    experiment: Experiment, tmp_path: Path
) -> None:
    """The unit's request went to one replica, and the outcome that followed it at once to another."""
    split = Split(experiment)
    log = write_log(tmp_path / "x.jsonl", exposures_of(experiment, UNITS[:2]))
    store = Store(tmp_path / "other.sqlite3", 10**8)
    for unit, seconds in zip(UNITS, (97.0, 90.0), strict=False):
        row = NewOutcome("kept", unit.encode().ljust(16), signed(split.hash_of(unit)), 1, 1, seconds, False)
        store.keep("exp", [row])
    store.close()

    (report,) = report_files(experiment, [log], [store.path]).outcomes

    assert (report.outcomes, report.unmatched) == (2, 1)
    assert sum(arm.units_with_outcome for arm in report.arms) == 1


def test_other_columns_are_read(experiment: Experiment, tmp_path: Path) -> None:
    csv = write_csv(
        tmp_path / "x.csv",
        "\ufeffunit,name,value,of,id,before,time",
        "ada,clicks,2.5,4,evt-1,,1970-01-01T00:01:40Z",
        " Jose\u0301 ,,1,,,true,",
    )

    first, second = read_csv(csv, Split(experiment), "kept")

    assert (first.name, first.value, first.of, first.time, first.is_before) == ("clicks", 2.5, 4, 100, False)
    assert (second.name, second.value, second.of, second.time, second.is_before) == ("kept", 1, 1, math.inf, True)
    assert second.unit == signed(Split(experiment).hash_of("Jos\u00e9"))


def test_the_same_row_twice_and_an_id_of_another_name_are_accepted(experiment: Experiment, tmp_path: Path) -> None:
    lines = ["unit,name,value,id", "ada,kept,1,1", "ada,kept,1,1", "bob,clicks,1,1", "ada,kept,2,", "bob,kept,2,"]
    csv = write_csv(tmp_path / "x.csv", *lines)

    assert len(list(read_csv(csv, Split(experiment), "kept"))) == 5
    (kept, _clicks) = report_files(experiment, [write_log(tmp_path / "x.jsonl", [])], [csv]).outcomes
    assert kept.outcomes == 3


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            [""],
            ": the first line must name the columns unit and value, and may name name, of, id, before, time; got nothing",
        ),
        (["unit,points"], ": the first line must name the columns unit and value, and may name .*; got unit, points"),
        (["unit,value", "ada,1", "bob,many"], ":3: `value` must be a number from -1e12 to 1e12, got the string 'many'"),
        (["unit,value", "ada,nan"], ":2: `value` must be a number"),
        (["unit,value", "ada,"], ":2: `value` is required"),
        (["unit,value", ",1"], ":2: `unit` is required"),
        (["unit,value", "ada,1,2"], ":2: `unit` and the other columns: the row has more values than the first line"),
        (["unit,value,time", "ada,1,yesterday"], ":2: Invalid isoformat string: 'yesterday'"),
        (["unit,value,before", "ada,1,perhaps"], ":2: `before` must be true or false, got the string 'perhaps'"),
        (["unit,value,name", "ada,1,a b"], ":2: `name` must have 1 to 64 letters"),
        (["unit,value,of", "ada,1,-1"], ":2: `of` must be a number of chances: 0, or .*, got the string '-1'"),
        (["unit,value", "ada,2e12"], ":2: `value` must be a number from -1e12 to 1e12, got the string '2e12'"),
        (["unit,value,of", "ada,1,2e12"], ":2: `of` must be a number of chances"),
        (["unit,value,of", "ada,1,1e-7"], ":2: `of` must be a number of chances"),
        (["unit,value", f"{'u' * 1025},1"], ":2: `unit` must be the unit as requests send it, .* bytes$"),
        (["unit,value,of", "ada,1,inf"], ":2: `of` must be a number of chances"),
        (
            ["unit,value,id", "ada,1,1", "ada,0,2", "bob,1,1"],
            ":4: `id` is also in line 2, with another unit or value: give each outcome its own id",
        ),
        (["unit,value,id", "ada,1,1", "ada,2,1"], ":3: `id` is also in line 2"),
        (["unit,value,id", 'ada,1,"e1', "bob,1,e2", "cy,1,e3"], ":4: unexpected end of data"),
        (["unit,value,id", 'ada,1,"e1"x', "bob,1,e2"], ":2: ',' expected after"),
        (["unit,value,id", f"ada,1,{'person' * 40}"], ":2: `id` must be a text of 1 to 200 characters, .* sent again$"),
    ],
)
def test_a_wrong_file_is_one_line(experiment: Experiment, tmp_path: Path, lines: list[str], message: str) -> None:
    csv = write_csv(tmp_path / "x.csv", *lines)

    with pytest.raises(StartError, match=f"x.csv{message}"):
        list(read_csv(csv, Split(experiment), "kept"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("unit,value\nada,1\n".encode("utf-16"), " is UTF-16: save it as UTF-8"),
        (gzip.compress(b"unit,value\nada,1\n", mtime=0), " is compressed with gzip: unpack it"),
        (None, " cannot be read: must be a regular file, but is a named pipe"),
    ],
)
def test_a_file_of_another_kind_is_named_with_the_remedy(
    experiment: Experiment, tmp_path: Path, content: bytes | None, message: str
) -> None:
    csv = tmp_path / "x.csv"
    if content is None:
        os.mkfifo(csv)
    else:
        csv.write_bytes(content)
    with pytest.raises(StartError, match=f"x.csv{message}"):
        list(read_csv(csv, Split(experiment), "kept"))
    with pytest.raises(StartError, match=f"x.csv{message}"):
        report_files(experiment, [], [csv])


def test_a_file_that_cannot_be_read_is_named(models: Path, experiment: Experiment, tmp_path: Path) -> None:
    log = write_log(tmp_path / "x.jsonl", exposures_of(experiment, UNITS[:3]))
    latin = tmp_path / "latin.csv"
    latin.write_bytes(b"unit,value\nJos\xe9,1\n")

    none = run("exp", "--models", models, "--exposures", log, "--outcomes", tmp_path / "none.csv")
    not_utf8 = run("exp", "--models", models, "--exposures", log, "--outcomes", latin)
    alone = run("exp", "--models", models, "--outcomes", latin)

    assert none == (1, "", f"the file {tmp_path / 'none.csv'} cannot be read: No such file or directory\n")
    assert not_utf8[2].startswith(f"{latin} cannot be read: 'utf-8' codec can't decode byte 0xe9")
    assert alone == (1, "", "--outcomes needs the exposures of the units: add --exposures FILE...\n")
