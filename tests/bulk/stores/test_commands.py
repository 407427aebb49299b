"""`gateway embed` with stores, as a user meets it."""

from __future__ import annotations

import functools
import json
import shutil
from contextlib import closing
from itertools import pairwise, product
from pathlib import Path
from urllib.parse import quote

import psycopg
import pytest
from click.testing import Result
from typer.testing import CliRunner

from gateway.backends.fake import FakeBackend, fake_info
from gateway.bulk.places import open_movable, read_place
from gateway.bulk.rows import BulkError, EmbeddedRows, RowId
from gateway.bulk.stores.qdrant_sink import QdrantSink
from gateway.cli.main import app
from gateway.deployment import Deployment
from tests.bulk.stores.rows import by_id, name_of

REGISTRY = """
version: 1
models:
  - {id: mini, source: package:fake/mini, enabled: true}
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models.yaml").write_text(REGISTRY)
    lines = [json.dumps({"id": f"d{n}", "text": f"text {n}", "meta": {"n": n}}) for n in range(5)]
    (tmp_path / "docs.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GATEWAY_MODELS", "models.yaml")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    make = functools.partial(Deployment, make_backend=lambda entry: FakeBackend(fake_info(entry.id)))
    monkeypatch.setattr("gateway.cli.in_process.Deployment", make)


def embed(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["embed", "--model", "mini", *arguments])


EXPECTED = {f"d{n}": (f"text {n}", {"meta": {"n": n}}) for n in range(5)}


def test_a_file_goes_through_all_stores() -> None:
    places = ["docs.jsonl", "qdrant:./q#docs", "lancedb:./l#docs", "qdrant:./q#copy"]
    for source, sink in pairwise(places):
        result = embed(source, "--to", sink)
        assert result.exit_code == 0, result.output
        assert f"{source} → {sink}: mini@" in result.stderr
        assert ("ids from the store" in result.stderr) == source.startswith("qdrant")
        assert by_id(sink) == EXPECTED


@pytest.mark.parametrize("sink", ["qdrant:./q#docs?vector=second", "qdrant:q#docs"])
def test_a_collection_is_not_written_into_itself(sink: str) -> None:
    """Each of its items would lose its other vectors."""
    assert embed("docs.jsonl", "--to", "qdrant:./q#docs").exit_code == 0
    refused = embed("qdrant:./q#docs", "--to", sink, "--restart")
    assert refused.exit_code == 1
    assert "is the collection that is read" in " ".join(refused.output.split())
    assert "--into-vector NAME" in " ".join(refused.output.split())
    assert by_id("qdrant:./q#docs") == EXPECTED


@pytest.mark.parametrize("kind", ["qdrant", "milvus", "pgvector"])
def test_a_collection_is_not_written_into_itself_by_another_name(kind: str, request: pytest.FixtureRequest) -> None:
    url = str(request.getfixturevalue(f"{kind}_url"))
    place = read_place(url)
    assert place is not None
    alias = f"{place.collection}_live"
    assert embed("docs.jsonl", "--to", url).exit_code == 0
    with closing(open_movable(place)) as store:
        store.flip(alias, place.collection)
    live = url.replace(place.collection, alias)
    for source, sink in ((url, live), (live, url), (live, live)):
        refused = embed(source, "--to", sink, "--adopt")
        assert refused.exit_code == 1
        assert "is the collection that is read" in " ".join(refused.output.split())
    assert by_id(url) == EXPECTED
    with closing(open_movable(place)) as store:
        store.delete_alias(alias)


def test_a_table_is_not_written_into_itself_by_its_name_with_schema_and_quotes(pgvector_url: str) -> None:
    table = name_of(pgvector_url)
    assert embed("docs.jsonl", "--to", pgvector_url).exit_code == 0
    names = [table, f"public.{table}", f'"{table}"', f'"public"."{table}"']
    for source, sink in product(names, names):
        into = pgvector_url.replace(table, quote(sink))
        refused = embed(pgvector_url.replace(table, quote(source)), "--to", into, "--adopt")
        assert refused.exit_code == 1, (source, sink)
        assert "is the collection that is read" in " ".join(refused.output.split()), (source, sink)
    assert by_id(pgvector_url) == EXPECTED


@pytest.mark.parametrize("kind", ["condition", "view of a view", "partition"])
def test_a_table_is_not_written_into_itself_by_what_shows_a_part_of_it(
    kind: str, pgvector_url: str, postgres: str
) -> None:
    table = name_of(pgvector_url)
    part, inner = f"{table}_part", f"{table}_inner"
    if kind != "partition":
        assert embed("docs.jsonl", "--to", pgvector_url).exit_code == 0
    statements = {
        "condition": ["CREATE VIEW {part} AS SELECT * FROM {table} WHERE id IS NOT NULL"],
        "view of a view": [
            "CREATE VIEW {inner} AS SELECT * FROM {table} WHERE id IS NOT NULL",
            "CREATE VIEW {part} AS SELECT id, payload, embedding FROM {inner}",
        ],
        "partition": [
            "CREATE TABLE {table} (id text PRIMARY KEY, payload jsonb, embedding vector(384)) PARTITION BY HASH (id)",
            "CREATE TABLE {part} PARTITION OF {table} FOR VALUES WITH (MODULUS 1, REMAINDER 0)",
        ],
    }[kind]
    with psycopg.connect(postgres, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.format(table=table, part=part, inner=inner).encode())
    other = pgvector_url.replace(table, part)
    for source, sink in ((other, pgvector_url), (pgvector_url, other)):
        refused = embed(source, "--to", sink, "--adopt", "--text", "text")
        assert refused.exit_code == 1
        assert "is the collection that is read" in " ".join(refused.output.split()), refused.output


def test_a_view_may_leave_out_the_rows_that_have_a_vector(pgvector_url: str, postgres: str) -> None:
    """Such a view names the table of the vectors, but shows none of its rows."""
    table = name_of(pgvector_url)
    with psycopg.connect(postgres, autocommit=True) as connection:
        for statement in (
            "CREATE TABLE {table}_docs (id text PRIMARY KEY, text text)",
            "INSERT INTO {table}_docs VALUES ('a', 'one'), ('b', 'two')",
            "CREATE TABLE {table} (id text PRIMARY KEY, text text, embedding vector)",
            "INSERT INTO {table} (id) VALUES ('a')",
            "CREATE VIEW {table}_left AS SELECT d.id, d.text FROM {table}_docs d "
            "WHERE NOT EXISTS (SELECT FROM {table} v WHERE v.id = d.id)",
        ):
            connection.execute(statement.format(table=table).encode())

        done = embed(f"{pgvector_url}_left?id=id", "--to", pgvector_url, "--text", "text")

        assert done.exit_code == 0, done.output
        found = connection.execute(b"SELECT id FROM %s WHERE embedding IS NOT NULL" % table.encode())
        assert found.fetchall() == [("b",)]


def test_a_table_is_written_into_one_of_another_schema(pgvector_url: str, postgres: str) -> None:
    table = name_of(pgvector_url)
    assert embed("docs.jsonl", "--to", pgvector_url).exit_code == 0
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA IF NOT EXISTS archive")
    other = pgvector_url.replace(table, f"archive.{table}")
    copied = embed(pgvector_url, "--to", other)
    assert copied.exit_code == 0, copied.output
    assert by_id(other) == EXPECTED


@pytest.mark.parametrize("kind", ["qdrant", "lancedb", "chroma"])
def test_a_sink_that_was_emptied_since_is_not_taken_for_complete(kind: str) -> None:
    sink = f"{kind}:./store#docs"
    assert embed("docs.jsonl", "--to", sink).exit_code == 0
    again = embed("docs.jsonl", "--to", sink)
    assert again.exit_code == 0
    assert "Nothing was left to do." in again.stdout
    shutil.rmtree("store")
    emptied = embed("docs.jsonl", "--to", sink)
    assert emptied.exit_code == 1
    assert f"{sink} has 0 rows, but " in emptied.stderr
    assert "it has 5 rows of this job: 5 are missing. If they were lost, " in emptied.stderr
    restarted = embed("docs.jsonl", "--to", sink, "--restart")
    assert restarted.exit_code == 0
    assert "--restart forgot" not in restarted.stdout
    assert len(by_id(sink)) == 5


def delete(url: str, *ids: RowId) -> None:
    place = read_place(url)
    assert place is not None
    with closing(open_movable(place)) as store:
        store.delete_ids(place.collection, ids)


def test_a_sink_that_lost_some_rows_is_not_taken_for_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the job continues, and when it ends."""
    sink = "qdrant:./store#docs"
    write, num_writes = QdrantSink.write, 0

    def lose(self: QdrantSink, shard: int, batch: EmbeddedRows) -> None:
        nonlocal num_writes
        num_writes += 1
        if num_writes == 3:
            self._remove(["d0", "d1"])
            raise BulkError("the store has gone away")
        write(self, shard, batch)

    with monkeypatch.context() as patch:
        patch.setattr(QdrantSink, "write", lose)
        assert "gone away" in embed("docs.jsonl", "--to", sink, "--shard-rows", "1").stderr
    lost = embed("docs.jsonl", "--to", sink, "--shard-rows", "1")
    assert (lost.exit_code, list(by_id(sink))) == (1, [])
    assert f"{sink} has 0 rows, but " in lost.stderr
    assert "it has 2 rows of this job: 2 are missing. If they were lost, " in lost.stderr

    with monkeypatch.context() as patch:
        num_writes = -10
        patch.setattr(QdrantSink, "write", lambda self, *a: (write(self, *a), self._remove(["d3"]))[0])
        lost = embed("docs.jsonl", "--to", sink, "--restart")
    assert lost.exit_code == 1
    assert "has 4 rows, but " in lost.stderr
    assert embed("docs.jsonl", "--to", sink).exit_code == 1
    assert embed("docs.jsonl", "--to", sink, "--restart").exit_code == 0
    assert by_id(sink) == EXPECTED


def test_a_job_continues_although_applications_deleted_some_of_its_rows() -> None:
    """The user accepts their number, which the error has."""
    sink = "qdrant:./store#docs"
    lines = Path("docs.jsonl").read_text()
    Path("docs.jsonl").write_text(f"{lines}\nnot JSON\n")
    command = ("docs.jsonl", "--to", sink, "--shard-rows", "1")
    assert embed(*command).exit_code == 1
    delete(sink, "d0", "d1")
    refused = embed(*command)
    assert refused.exit_code == 1
    assert "If applications deleted them, accept that with --max-missing 2" in " ".join(refused.stderr.split())
    assert embed(*command, "--max-missing", "1", "--on-error", "skip").exit_code == 1

    done = embed(*command, "--max-missing", "2", "--on-error", "skip")

    assert done.exit_code == 0, done.output
    assert "5 rows of mini@" in done.stdout
    assert by_id(sink).keys() == {"d2", "d3", "d4"}
    assert "Nothing was left to do." in embed(*command, "--max-missing", "2").stdout


def test_rows_of_other_programs_are_not_taken_for_rows_of_a_forgotten_job() -> None:
    """Beyond the number of rows that the forgotten job had."""
    sink = "qdrant:./store#docs"
    assert embed("docs.jsonl", "--to", sink).exit_code == 0
    assert embed("docs.jsonl", "--to", sink, "--restart").exit_code == 0
    lines = [json.dumps({"id": f"other {n}", "text": f"text {n}"}) for n in range(20)]
    Path("others.jsonl").write_text("\n".join(lines))
    assert embed("others.jsonl", "--to", sink).exit_code == 0

    shown = [json.loads(embed("docs.jsonl", "--to", sink, "--json", *more).stdout) for more in ((), ("--restart",))]

    assert [report["stale_rows"] for report in shown] == [5, 5]


@pytest.mark.parametrize("kind", ["qdrant", "lancedb"])
def test_rows_of_a_forgotten_job_that_stay_are_counted(kind: str) -> None:
    sink = f"{kind}:./store#docs"
    assert embed("docs.jsonl", "--to", sink).exit_code == 0
    lines = [json.dumps({"id": f"d{n}", "text": f"new text {n}"}) for n in (0, 1, 100)]
    Path("docs.jsonl").write_text("\n".join(lines))

    restarted = embed("docs.jsonl", "--to", sink, "--restart")

    assert restarted.exit_code == 0
    assert "Up to 3 rows of the job that --restart forgot are still there" in " ".join(restarted.stdout.split())
    assert len(by_id(sink)) == 6
    shown = json.loads(embed("docs.jsonl", "--to", sink, "--json").stdout)
    assert (shown["rows"], shown["stale_rows"]) == (3, 3)
    Path("docs.jsonl").write_text(lines[0])
    again = embed("docs.jsonl", "--to", sink, "--restart")
    assert "5 rows of the job that --restart forgot" in again.stdout
    if kind == "qdrant":
        delete(sink, "d2", "d3", "d4", "d100", "d1")
        assert "--restart forgot" not in embed("docs.jsonl", "--to", sink).stdout


@pytest.mark.parametrize("kind", ["qdrant", "lancedb", "chroma"])
def test_a_source_that_does_not_exist_is_not_made(kind: str, tmp_path: Path) -> None:
    result = embed(f"{kind}:./nothing#docs", "--to", "out")
    assert result.exit_code == 1
    assert result.stderr.startswith("there is no ")
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("kind", ["qdrant", "chroma"])
def test_a_folder_with_other_files_is_neither_source_nor_sink(kind: str, tmp_path: Path) -> None:
    assert embed("docs.jsonl", "--to", "lancedb:./l#docs").exit_code == 0
    before = sorted((tmp_path / "l").rglob("*"))
    result = embed(f"{kind}:./l#docs", "--to", "out")
    assert result.stderr == f"the folder ./l does not contain a {kind} store\n"
    result = embed("docs.jsonl", "--to", f"{kind}:./l#docs")
    assert (
        f"the folder ./l contains other files, such as docs.lance, and no {kind} store: choose a new folder"
        in result.stderr
    )
    assert sorted((tmp_path / "l").rglob("*")) == before
