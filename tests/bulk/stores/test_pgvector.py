"""PostgreSQL with pgvector as a source, a sink and a store that can be moved: a real server."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import psycopg
import pytest

from gateway.bulk.fields import FieldNames
from gateway.bulk.places import open_movable, read_place
from gateway.bulk.rows import BadRow, BulkError, Json, Row, RowId, RowsRefused
from gateway.bulk.stores.pgvector import PgvectorStore
from gateway.bulk.stores.pgvector_session import Session
from gateway.bulk.stores.pgvector_sink import PgvectorSink
from gateway.bulk.stores.pgvector_tables import read_name, refusals
from gateway.bulk.stores.protocol import Since, SinkOptions
from tests.bulk.stores.rows import NOTE, by_id, embedded, open_url, read, row, vector_of, write

PAYLOAD: dict[str, Json] = {
    "nested": {"list": [1, None, {"a": "ü"}], "empty": {}},
    "none": None,
    "yes": True,
    "number": 0.1,
    "large": 2**70,
    "日本": "語\n\t\U0001f600",
}
WIDE = replace(NOTE, space="wide@0123456789ab", model="wide", dimensions=6)


@pytest.fixture
def sql(postgres: str) -> Iterator[psycopg.Connection]:
    """A connection to an empty database."""
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute('DROP SCHEMA IF EXISTS "Sales Dept" CASCADE')
        connection.execute("CREATE SCHEMA public")
        connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
        yield connection


@pytest.fixture
def base(sql: psycopg.Connection, pgvector_base: str) -> str:
    return pgvector_base


@pytest.fixture
def url(base: str) -> str:
    return f"{base}/docs"


@pytest.fixture
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.bulk.stores.pgvector_rows.PAGE", 3)
    monkeypatch.setattr("gateway.bulk.stores.pgvector._DIGEST_PAGE", 3)


def store_of(url: str) -> PgvectorStore:
    place = read_place(url)
    assert place is not None
    store = open_movable(place)
    assert isinstance(store, PgvectorStore)
    return store


def value(sql: psycopg.Connection, query: str) -> object:
    [found] = sql.execute(query).fetchone() or (None,)  # type: ignore[call-overload]
    return found


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("docs", ("docs", None)),
        ("sales.docs", ("docs", "sales")),
        ('"Sales Dept"."my.docs"', ("my.docs", "Sales Dept")),
        ('"a""b"', ('a"b', None)),
    ],
)
def test_names_of_tables_are_read_as_in_sql(text: str, name: tuple[str, str | None]) -> None:
    found = read_name(text)
    assert (found.table, found.schema) == name
    assert read_name(str(found)) == found


@pytest.mark.parametrize("text", ["", ".", "a.", ".a", "a.b.c", '"a', 'a"b"', '""'])
def test_other_names_are_refused(text: str) -> None:
    with pytest.raises(BulkError, match="is not the name of a table"):
        read_name(text)


def test_rows_and_their_vectors_are_kept_exactly(url: str, sql: psycopg.Connection) -> None:
    rows = [row(row_id, f"text of {row_id}", PAYLOAD) for row_id in (3, -4, 2**62)]
    write(url, rows)

    assert by_id(url) == {row.id: (row.text, row.payload) for row in rows}
    found = sql.execute("SELECT id, embedding::real[] FROM docs").fetchall()
    for row_id, vector in found:
        np.testing.assert_array_equal(np.float32(vector), vector_of(f"text of {row_id}"))


def test_a_shard_is_written_as_a_whole_or_not_at_all(url: str) -> None:
    write(url, [row(1, "a")])
    with pytest.raises(BulkError, match=r"id x: its id 'x' is text, but the ids of .*docs are integers"):
        write(url, [row(2, "b"), row("x", "c")])
    with pytest.raises(BulkError, match=r"id 3: the field `text` has the character U\+0000"):
        write(url, [row(2, "b"), row(3, "zero \0")])
    assert list(by_id(url)) == [1]


def test_the_index_is_hnsw_by_cosine_where_pgvector_supports_it(base: str, sql: psycopg.Connection) -> None:
    for width, kind in [(2_000, "vector"), (2_001, "halfvec"), (4_000, "halfvec"), (4_001, "vector")]:
        write(f"{base}/d{width}", [row(1, "a")], replace(NOTE, dimensions=width))
        definition = value(sql, f"SELECT string_agg(indexdef, ';') FROM pg_indexes WHERE tablename = 'd{width}'")  # noqa: S608
        assert (f"USING hnsw (embedding {kind}_cosine_ops)" in str(definition)) is (width <= 4_000)
        assert value(sql, f"SELECT pg_typeof(embedding)::text FROM d{width}") == kind  # noqa: S608
        store = store_of(base + "/d")
        [found] = store.vectors(f"d{width}", [1]).values()
        store.close()
        np.testing.assert_allclose(found, vector_of("a", width), atol=1e-4 if kind == "halfvec" else 0)
    with pytest.raises(BulkError, match="at most 16,000 dimensions, got 16,001"):
        write(f"{base}/large", [], replace(NOTE, dimensions=16_001))


def test_a_table_without_a_note_or_of_another_width_is_refused(url: str, sql: psycopg.Connection) -> None:
    sql.execute("CREATE TABLE mine (id int PRIMARY KEY, v vector(4), body text)")
    mine = url.replace("docs", "mine")
    write(mine, [], replace(NOTE, dimensions=4))
    sql.execute("COMMENT ON COLUMN mine.v IS NULL")
    sql.execute("INSERT INTO mine VALUES (1, '[1,2,3,4]', 'x')")
    with pytest.raises(BulkError, match="has 1 item and no note of their space"):
        write(mine, [])
    with pytest.raises(BulkError, match=r"`v` of .*mine requires vectors of 4 dimensions, but those of wide have 6"):
        write(mine, [], WIDE, SinkOptions(adopts=True))
    write(mine, [row(2, "y")], NOTE, SinkOptions(text="body", adopts=True))
    assert by_id(mine, FieldNames(text="body")) == {1: ("x", {}), 2: ("y", {})}


def test_the_note_leaves_a_comment_of_the_user(url: str, sql: psycopg.Connection) -> None:
    sql.execute("CREATE TABLE docs (id bigint PRIMARY KEY, v vector(4), payload jsonb)")
    sql.execute("COMMENT ON COLUMN docs.v IS 'of the titles\nonly'")
    write(url, [])
    store = store_of(url)
    assert store.describe("docs").notes == {"v": NOTE}
    store.close()
    assert str(value(sql, "SELECT col_description('docs'::regclass, 2)")).startswith(
        "of the titles\nonly\nembedding_gatew"
    )
    sql.execute("COMMENT ON COLUMN docs.v IS 'embedding_gateway={\"space\":'")
    with pytest.raises(BulkError, match="cannot be read, because a person or another program changed it"):
        write(url, [])


TYPED = """
CREATE SCHEMA "Sales Dept";
CREATE TABLE "Sales Dept"."my.docs" (
    "Key" uuid PRIMARY KEY, "the body" text NOT NULL, v vector(4), meta jsonb, n numeric(20, 8), t timestamptz DEFAULT now(),
    tags text[], raw bytea, long bigint GENERATED ALWAYS AS IDENTITY, title vector(2), lean sparsevec(9),
    words tsvector GENERATED ALWAYS AS (to_tsvector('simple', "the body")) STORED, num serial);
CREATE INDEX ON "Sales Dept"."my.docs" USING hnsw (v vector_l2_ops);
CREATE INDEX ON "Sales Dept"."my.docs" USING gin (words);
CREATE ROLE reader; GRANT SELECT ON "Sales Dept"."my.docs" TO reader, PUBLIC;
INSERT INTO "Sales Dept"."my.docs" ("Key", "the body", v, meta, n, t, tags, raw, title, lean) SELECT
    md5(i::text)::uuid, 'body ' || i, '[1,2,3,4]', '{"a": [1, null]}', 12345678901 + i / 3.0,
    '2026-01-01 00:00:00.123456+05', ARRAY['x', NULL, 'y"z'], '\\x00ff', '[1,2]', '{1:2}/9' FROM generate_series(1, 7) i;
"""


@pytest.mark.usefixtures("_small_pages")
def test_a_copy_has_all_columns_indexes_and_grants_of_a_table_and_vectors_of_another_width(
    base: str, sql: psycopg.Connection
) -> None:
    sql.execute(TYPED.encode())
    old, new = '"Sales Dept"."my.docs"', '"Sales Dept".docs_wide'
    url = f"{base}/{quote(old)}?vector=v"
    fields, options = FieldNames(text="the body"), SinkOptions(text="the body", vector="v", like=old)
    rows = [found for found in read(url, fields) if isinstance(found, Row)]
    write(f"{base}/{quote(new)}?vector=v", rows, WIDE, options)

    store = store_of(url)
    assert list(store.digests(old)) == list(store.digests(new))
    assert store.describe(new).widths == {"v": 6, "title": 2}
    assert store.describe(new).notes == {"v": WIDE}
    same = '"Key", "the body", meta, n, t, tags, raw, long, words, num, title, lean'
    both = [sql.execute(f"SELECT {same} FROM {table} ORDER BY 1".encode()).fetchall() for table in (old, new)]  # noqa: S608
    assert both[0] == both[1]
    indexes = str(value(sql, "SELECT string_agg(indexdef, ';') FROM pg_indexes WHERE tablename = 'docs_wide'"))
    assert "hnsw (v vector_l2_ops)" in indexes
    assert "gin (words)" in indexes
    assert value(sql, "SELECT relacl::text LIKE '%reader=r/%' FROM pg_class WHERE relname = 'docs_wide'") is True
    assert str(store.search(new, vector_of("body 3", 6), 1)[0].id) == str(value(sql, "SELECT md5('3')::uuid"))
    store.delete_collection(old)
    assert value(sql, f'INSERT INTO {new} ("Key", "the body") VALUES (gen_random_uuid(), \'b\') RETURNING num') == 8  # noqa: S608
    store.close()


def test_a_copy_of_a_table_with_too_wide_an_index_gets_another_type(url: str, sql: psycopg.Connection) -> None:
    write(url, [row(1, "a")])
    write(url.replace("docs", "new"), [row(1, "a")], replace(WIDE, dimensions=3_072), SinkOptions(like="docs"))
    indexes = str(value(sql, "SELECT string_agg(indexdef, ';') FROM pg_indexes WHERE tablename = 'new'"))
    assert "hnsw (embedding halfvec_cosine_ops)" in indexes
    sql.execute("CREATE TABLE plain (id int PRIMARY KEY, v vector(4))")
    with pytest.raises(BulkError, match="there is no table `gone`"):
        write(url.replace("docs", "new2"), [], WIDE, SinkOptions(like="gone"))


def test_ids_of_an_identity_continue_after_the_copied_ones(url: str, sql: psycopg.Connection) -> None:
    sql.execute("CREATE TABLE docs (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v vector(4), body text)")
    sql.execute("INSERT INTO docs (v, body) VALUES ('[1,2,3,4]', 'a'), ('[1,2,3,4]', 'b')")
    rows = [found for found in read(url, FieldNames(text="body")) if isinstance(found, Row)]
    write(url.replace("docs", "new"), rows, WIDE, SinkOptions(text="body", like="docs"))
    sql.execute("INSERT INTO new (body) VALUES ('c')")
    assert by_id(url.replace("docs", "new"), FieldNames(text="body"))[3] == ("c", {})


def test_a_field_without_a_column_is_refused_with_its_name(url: str, sql: psycopg.Connection) -> None:
    sql.execute("CREATE TABLE docs (id bigint PRIMARY KEY, v vector(4), body text)")
    with pytest.raises(
        BulkError, match="has no column `author` for the field of id 1: add the column, or keep fewer fields"
    ):
        write(url, [row(1, "a", {"author": "x"})], NOTE, SinkOptions(text="body"))


def test_names_may_have_percent_signs_and_other_characters(base: str, sql: psycopg.Connection) -> None:
    columns = '"i%d" bigint PRIMARY KEY, "text%s" text, "100%" text, "q""uote\\" text, "v%b" vector(4)'
    sql.execute(f'CREATE SCHEMA "50%"; CREATE TABLE "50%"."docs %t" ({columns})')  # type: ignore[arg-type]
    url, fields = f"{base}/{quote('50%.docs %t')}", FieldNames(text="text%s")
    payload = {"100%": "x", 'q"uote\\': "y"}
    write(url, [row(1, "a", payload), row(2, "b", payload)], NOTE, SinkOptions(text="text%s"))
    write(url, [row(2, "c", payload)], NOTE, SinkOptions(text="text%s"))

    assert by_id(url, fields) == {1: ("a", payload), 2: ("c", payload)}
    assert [found.id for found in read(url, fields, 1)] == [2]
    store, name = store_of(url), "50%.docs %t"
    assert [row.text for row in store.read_ids(name, [1], fields)] == ["a"]
    assert store.vectors(name, [1, 2]).keys() == {1, 2}
    assert store.search(name, vector_of("c"), 1)[0].id == 2
    with closing(store.sink("copy %s", SinkOptions("text%s", like=name))) as sink:
        sink.open(WIDE)
        sink.write(0, embedded([row(1, "a", payload)], WIDE))
    view = "view %d"
    store.flip(view, name)
    store.flip(view, "copy %s")
    assert store.aliases()[view] == "copy %s"
    store.delete_ids(name, [1])
    assert store.describe(name).count == 1
    store.close()


def test_a_character_that_postgresql_cannot_store_is_a_problem_of_its_row(url: str, sql: psycopg.Connection) -> None:
    place = read_place(url)
    assert place is not None
    with closing(open_movable(place)) as store, closing(store.sink("docs", SinkOptions("text"))) as sink:
        # Only a row that can be stored decides whether the ids are texts.
        assert sink.problem(row("a\0", "b")).startswith("the field `id` has the character U+0000, which PostgreSQL")
        assert not sink.problem(row(1, "a\\u0000", {"k": ["b", {"c": None}]}))
        for bad, name in [
            (row(1, "a\0"), "text"), (row(1, "a", {"k": [{"l": "\0"}]}), "k"),
            (row(1, "a", {"k": {"\0": 1}}), "k"), (row(1, "a", {"n\0": 1}), "n\\0"),
        ]:  # fmt: skip
            assert sink.problem(bad).startswith(f"the field `{name}` has the character U+0000, which PostgreSQL")


def test_an_id_that_its_column_cannot_store_is_a_problem_of_its_row(url: str, sql: psycopg.Connection) -> None:
    cases: list[tuple[str, list[RowId], list[tuple[RowId, str]]]] = [
        ("smallint", [-(2**15), 2**15 - 1], [(2**15, "its id 32768 is out of range for the type smallint")]),
        ("bigint", [2**63 - 1], [(2**63, "out of range for the type bigint"), ("5", "is text, but the ids of")]),
        ("uuid", ["A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11", "{a0ee-bc999c0b4ef8bb6d6bb9bd380a12}"], [
            (bad, f"its id {bad!r} is not a UUID, as the column `id`")
            # Python's UUID reads the others, PostgreSQL does not.
            for bad in ("x", "{a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", "uuid:a0eebc999c0b4ef8bb6d6bb9bd380a11",
                        "a0_ebc99-9c0b-4ef8-bb6d-6bb9bd380a11", "a0-eebc999c0b4ef8bb6d6bb9bd380a11")
        ]),
        ("varchar(3)", ["äöü"], [("abcd", "its id has 4 characters, but the column `id` takes at most 3")]),
        ("text", ["ab" * 600], [("語" * 1000, "its id has 3,000 bytes, but can have at most 2,600"), (5, "is an integer")]),
    ]  # fmt: skip
    for kind, good, bad in cases:
        columns = f"id {kind} PRIMARY KEY, embedding vector(4), payload jsonb"
        sql.execute(f"DROP TABLE IF EXISTS docs; CREATE TABLE docs ({columns})".encode())
        write(url, [row(row_id, "a") for row_id in good])
        for row_id, message in bad:
            with closing(store_of(url)) as store, closing(store.sink("docs", SinkOptions("text"))) as sink:
                sink.open(NOTE)
                assert not any(sink.problem(row(fine, "a")) for fine in good)
                assert message in sink.problem(row(row_id, "a"))
                with pytest.raises(BulkError, match=re.escape(message)):
                    sink.write(0, embedded([row(row_id, "a")]))


def test_a_text_that_its_column_cannot_store_is_a_problem_of_its_row(url: str, sql: psycopg.Connection) -> None:
    sql.execute(
        "CREATE TABLE docs (id bigint PRIMARY KEY, embedding vector(4), text varchar(5), tag varchar(3), n int)"
    )
    with closing(store_of(url)) as store, closing(store.sink("docs", SinkOptions("text"))) as sink:
        sink.open(NOTE)
        assert sink.problem(row(1, "äöüäöü")) == "its text has 6 characters, but the column `text` takes at most 5"
        assert "has 4 characters, but the column `tag` takes at most 3" in sink.problem(row(1, "a", {"tag": "abcd"}))
        sink.write(0, embedded([row(1, "äöüäö", {"tag": "abc", "n": 1})]))
    assert by_id(url) == {1: ("äöüäö", {"tag": "abc", "n": 1})}


CHECKED = """
CREATE TABLE docs (
    id bigint PRIMARY KEY, embedding vector(4), text text, n int NOT NULL DEFAULT 7 CHECK (n < 100), slug text UNIQUE,
    day date)
"""


def test_rows_that_the_table_rejects_are_named_and_no_row_is_stored(url: str, sql: psycopg.Connection) -> None:
    sql.execute(CHECKED)
    good: dict[str, Json] = {"n": 1, "slug": None, "day": "2026-01-02"}
    bad: list[tuple[dict[str, Json], str]] = [
        ({**good, "n": None}, 'null value in column "n" of relation "docs" violates not-null constraint'),
        ({**good, "n": 100}, 'new row for relation "docs" violates check constraint "docs_n_check"'),
        ({**good, "n": 2**40}, 'value "1099511627776" is out of range for type integer'),
        ({**good, "n": "many"}, 'invalid input syntax for type integer: "many"'),
        ({**good, "day": "soon"}, 'invalid input syntax for type date: "soon"'),
        ({**good, "slug": "twice"}, 'duplicate key value violates unique constraint "docs_slug_key"'),
    ]
    rows = [row(n, f"text {n}", {**good, "slug": "twice" if n == 2 else None}) for n in range(50)]
    for number, (payload, _problem) in enumerate(bad):
        rows[7 * number + 5] = row(7 * number + 5, "bad", payload)
    store, collection = open_url(url)
    with closing(store), closing(store.sink(collection, SinkOptions("text"))) as sink:
        sink.open(NOTE)
        with pytest.raises(RowsRefused, match=r"id 5: PostgreSQL rejects it: null value in column") as caught:
            sink.write(0, embedded(rows))
        found = [(one.id, one.problem) for one in caught.value.rows]
        assert found == [(7 * n + 5, f"PostgreSQL rejects it: {problem}") for n, (_, problem) in enumerate(bad)]
        assert value(sql, "SELECT count(*) FROM docs") == 0
        names = {one.place for one in caught.value.rows}
        sink.write(0, embedded([one for one in rows if one.place not in names]))
    assert value(sql, "SELECT count(*) FROM docs") == 44


def test_rows_of_a_copy_that_exchange_a_unique_value_are_written(url: str, sql: psycopg.Connection) -> None:
    sql.execute(CHECKED)

    def rows(*slugs: str) -> list[Row]:
        return [row(n, f"text {n}", {"slug": slug, "n": 1}) for n, slug in enumerate(slugs)]

    new, options = url.replace("docs", "new"), SinkOptions("text", like="docs")
    write(new, rows("a", "b", "c"), WIDE, options)
    write(new, rows("b", "a", "c"), WIDE, options)
    assert {n: payload["slug"] for n, (_, payload) in by_id(new).items()} == {0: "b", 1: "a", 2: "c"}
    with pytest.raises(RowsRefused, match=r"id 1: PostgreSQL rejects it: duplicate key value") as caught:
        write(new, rows("b", "c"), WIDE, options)  # the row with c is not among these
    assert len(caught.value.rows) == 1
    sql.execute("CREATE TABLE child (doc bigint REFERENCES new ON DELETE CASCADE); INSERT INTO child VALUES (0)")
    with pytest.raises(RowsRefused):
        write(new, rows("a", "b"), WIDE, options)
    assert value(sql, "SELECT count(*) FROM child") == 1


def test_a_decimal_number_keeps_all_its_digits(url: str, sql: psycopg.Connection) -> None:
    sql.execute("CREATE TABLE docs (id bigint PRIMARY KEY, embedding vector(4), text text, price numeric)")
    numbers = [
        "12345678901234.123456789",
        "0.1",
        "-7",
        "123456789012345678901234567890",
        "1e-30",
        "NaN",
        "99.50",
        "1e400",
    ]
    for number, price in enumerate(numbers):
        sql.execute("INSERT INTO docs VALUES (%s, '[1,2,3,4]', 'x', %s::numeric)", [number, price])
    items = [found for found in read(url) if isinstance(found, Row)]
    assert [item.payload["price"] for item in items][:4] == [numbers[0], 0.1, -7, int(numbers[3])]
    write(url.replace("docs", "new"), items, WIDE, SinkOptions("text", like="docs"))
    query = "SELECT count(*) FROM docs JOIN new USING (id) WHERE docs.price = new.price"
    assert value(sql, query) == len(numbers)
    with closing(store_of(url)) as store:
        assert list(store.digests("docs")) == list(store.digests("new"))


def test_a_password_that_is_wrong_or_missing_is_named_and_not_printed(
    url: str, sql: psycopg.Connection, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = Path(str(value(sql, "SHOW hba_file")))
    before = file.read_text()
    sql.execute("DROP ROLE IF EXISTS careful; CREATE ROLE careful LOGIN PASSWORD 'right-secret'")
    write(url, [row(1, "a")])
    sql.execute("GRANT ALL ON ALL TABLES IN SCHEMA public TO careful; GRANT ALL ON SCHEMA public TO careful")
    theirs = url.replace("postgres@", "careful@")
    monkeypatch.setenv("PGPASSFILE", str(tmp_path / "none"))
    try:
        file.write_text(f"local all careful scram-sha-256\n{before}")
        sql.execute("SELECT pg_reload_conf()")
        cases = [
            ("PGPASSWORD", "", "wrong-secret", "rejects the password of `careful` in .* PGPASSWORD or in"),
            ("PGPASSWORD", "", None, r"needs a password for `careful`: put it into .* PGPASSWORD or in ~/\.pgpass"),
            ("MINE", "?key_env=MINE", "wrong-secret", "rejects the password of `careful` in the environment variable MINE"),
            ("MINE", "?key_env=MINE", None, "needs a password for `careful`: put it into the environment variable MINE"),
        ]  # fmt: skip
        for name, query, secret, message in cases:
            monkeypatch.delenv("PGPASSWORD", raising=False)
            monkeypatch.delenv("MINE", raising=False)
            if secret:
                monkeypatch.setenv(name, secret)
            with pytest.raises(BulkError, match=message) as caught:
                read(theirs + query)
            assert "secret" not in str(caught.value)
        monkeypatch.setenv("PGPASSWORD", "right-secret")
        assert set(by_id(theirs)) == {1}
    finally:
        file.write_text(before)
        sql.execute("SELECT pg_reload_conf()")


def test_a_server_that_cannot_write_is_not_called_away(url: str, sql: psycopg.Connection) -> None:
    write(url, [row(1, "a")])
    sql.execute(
        "CREATE OR REPLACE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION USING ERRCODE = 'disk_full', MESSAGE = 'could not extend file'; END $$;"
        "CREATE TRIGGER is_full BEFORE INSERT ON docs FOR EACH ROW EXECUTE FUNCTION full_disk()"
    )
    with pytest.raises(
        BulkError, match=r"docs: PostgreSQL rejects the request: could not extend file; make room, and run the same"
    ):
        write(url, [row(2, "b")])


def test_a_table_is_the_same_with_and_without_its_schema(url: str, sql: psycopg.Connection) -> None:
    write(url, [row(1, "a")])
    sql.execute("DROP SCHEMA IF EXISTS apart CASCADE; CREATE SCHEMA apart; CREATE VIEW shown AS SELECT * FROM docs")
    write(url.replace("/docs", "/apart.docs"), [row(2, "b")], WIDE)
    store = store_of(url)
    assert store.describe("public.docs").name == store.describe("docs").name == "docs"
    assert store.describe("public.shown").name == store.describe("shown").name == "docs"
    assert (store.describe("apart.docs").name, store.describe("apart.docs").notes) == (
        "apart.docs",
        {"embedding": WIDE},
    )
    store.flip("public.shown", "apart.docs")
    assert store.aliases() == {"shown": "apart.docs"}
    store.delete_alias("public.shown")
    assert store.aliases() == {}
    long = "语" * 21  # 63 bytes, the most that a name can have
    for table in ("docs", "apart.docs", "docs"):
        store.flip(long, table)
        assert store.aliases()[long] == table
    store.close()


def test_a_vector_is_added_next_to_the_first(url: str, sql: psycopg.Connection) -> None:
    write(url, [row(1, "a", {"k": 1}), row(2, "b")])
    write(url, [row(1, "a"), row(3, "deleted in between")], WIDE, SinkOptions(vector="wide", updates=True))
    assert by_id(url) == {1: ("a", {"k": 1}), 2: ("b", {})}
    store = store_of(url)
    assert store.describe("docs").notes == {"embedding": NOTE, "wide": WIDE}
    assert {row_id: len(found) for row_id, found in store.vectors("docs", [1, 2, 3], "wide").items()} == {1: 6}
    with pytest.raises(BulkError, match=r"several vectors: name one of `embedding`, `wide` with \?vector=NAME"):
        store.search("docs", vector_of("a"), 1)
    store.close()


def test_rows_without_a_text_are_reported(url: str, sql: psycopg.Connection) -> None:
    write(url, [row(1, "a")])
    sql.execute("INSERT INTO docs VALUES (2, NULL, '{\"text\": \"\"}'), (3, NULL, NULL), (4, NULL, '[1]')")
    bad = [found for found in read(url) if isinstance(found, BadRow)]
    assert [(found.id, found.problem) for found in bad] == [
        (2, "the text in field `text` is empty"),
        (3, "the text in field `text` is missing"),
        (4, "the text in field `text` is missing"),
    ]
    assert bad[0].place.startswith("id 2 of pgvector://")


def test_only_later_rows(url: str) -> None:
    write(
        url,
        [
            row(1, "a", {"at": "2026-01-01T00:00:00+00:00"}),
            row(2, "b", {"at": "2026-03-01T00:00:00+00:00"}),
            row(3, "c"),
        ],
    )
    store, collection = open_url(url)
    source = store.source(collection, FieldNames(), Since("at", datetime(2026, 2, 1, tzinfo=UTC)))
    assert [found.id for found in source.read()] == [2, 3], "what cannot be compared is read again rather than missed"
    source.close()
    store.close()


def test_a_flip_moves_a_view_in_one_step_for_all_readers(url: str, postgres: str, sql: psycopg.Connection) -> None:
    write(url.replace("docs", "docs_1"), [row(n, "old") for n in range(50)])
    write(url.replace("docs", "docs_2"), [row(n, "new") for n in range(50)], WIDE, SinkOptions(like="docs_1"))
    store = store_of(url)
    store.flip("docs", "docs_1")
    sql.execute("DROP ROLE IF EXISTS app; CREATE ROLE app; GRANT SELECT, INSERT ON docs TO app")
    seen: set[tuple[object, ...]] = set()
    failures: list[BaseException] = []
    ends = threading.Event()

    def search() -> None:
        try:
            with psycopg.connect(postgres, autocommit=True) as reader:
                while not ends.is_set():
                    rows = reader.execute("SELECT vector_dims(embedding), payload->>'text' FROM docs").fetchall()
                    assert len(rows) == 50
                    seen.update(rows)
        except BaseException as error:  # shown below
            failures.append(error)

    readers = [threading.Thread(target=search) for _ in range(3)]
    for reader in readers:
        reader.start()
    for turn in range(20):
        store.flip("docs", f"docs_{1 + (turn + 1) % 2}")
    ends.set()
    for reader in readers:
        reader.join()

    assert not failures
    assert seen == {(4, "old"), (6, "new")}
    assert store.aliases() == {"docs": "docs_1"}
    assert "app=ar/" in str(value(sql, "SELECT relacl FROM pg_class WHERE oid = to_regclass('docs')"))
    assert store.describe("docs").name == "docs_1"
    with pytest.raises(BulkError, match="still in use by the view `docs`"):
        store.delete_collection("docs_1")
    store.delete_alias("docs")
    store.delete_collection("docs_1")
    assert store.collections() == ["docs_2"]
    store.close()


def test_a_flipped_view_keeps_its_schema_owner_and_options(url: str, postgres: str, sql: psycopg.Connection) -> None:
    """The schema of the view is not the first one of the operator's search path, and the owner is an application."""
    write(url.replace("docs", "docs_1"), [row(1, "old")])
    sql.execute(
        "DROP SCHEMA IF EXISTS postgres CASCADE; CREATE SCHEMA postgres; DROP ROLE IF EXISTS app; CREATE ROLE app LOGIN;"
        "ALTER TABLE docs_1 OWNER TO app; CREATE VIEW public.docs WITH (security_invoker=true) AS SELECT * FROM docs_1;"
        "COMMENT ON VIEW docs IS 'of the shop''s app'; COMMENT ON COLUMN docs.payload IS 'all of it';"
        "ALTER VIEW docs OWNER TO app; GRANT ALL ON SCHEMA public TO app"
    )
    write(url.replace("docs", "docs_2"), [row(2, "new")], WIDE, SinkOptions(like="docs_1"))
    assert value(sql, "SELECT has_table_privilege('app', 'docs_2', 'INSERT')")
    try:
        with closing(store_of(url)) as store:
            sql.execute("REVOKE ALL ON docs_2 FROM app")
            with pytest.raises(BulkError, match="`app`, who owns the view `docs`, may not read docs_2: grant SELECT"):
                store.flip("docs", "docs_2")
            assert store.aliases() == {"docs": "docs_1"}
            sql.execute("GRANT ALL ON docs_2 TO app")
            store.flip("docs", "docs_2")
            assert store.aliases() == {"docs": "docs_2"}
        found = sql.execute(
            "SELECT relnamespace::regnamespace::text, pg_get_userbyid(relowner), reloptions FROM pg_class "
            "WHERE oid = to_regclass('docs')"
        ).fetchall()
        assert found == [("public", "app", ["security_invoker=true"])]
        assert value(sql, "SELECT obj_description('docs'::regclass)") == "of the shop's app"
        assert value(sql, "SELECT col_description('docs'::regclass, 3)") == "all of it"
        assert value(sql, "SELECT to_regclass('public.docs_2') IS NOT NULL")
        with psycopg.connect(postgres, autocommit=True) as application:
            application.execute("SET ROLE app")
            assert application.execute("SELECT id FROM docs").fetchall() == [(2,)]
            application.execute("INSERT INTO docs_2 (id, payload) VALUES (3, '{}')")
    finally:
        sql.execute(
            "DROP SCHEMA postgres CASCADE; DROP VIEW docs; DROP TABLE docs_1, docs_2; DROP OWNED BY app; DROP ROLE app"
        )


def test_a_flip_that_is_impossible_gives_the_reason(url: str, sql: psycopg.Connection) -> None:
    write(url, [row(1, "a")])
    others = {
        "part": "SELECT * FROM docs WHERE id > 5",
        "renamed": "SELECT id AS number, embedding, payload FROM docs",
        "swapped": "SELECT id, payload AS embedding, embedding AS payload FROM docs",
        "turned": "SELECT payload, embedding, id FROM docs",
        "hiding": "SELECT id, payload FROM docs",
        "distinct_ones": "SELECT DISTINCT * FROM docs",
    }
    for name, query in others.items():
        sql.execute(f"CREATE VIEW {name} AS {query}")  # type: ignore[arg-type]
    sql.execute("CREATE VIEW plain AS SELECT * FROM docs; ALTER TABLE docs ADD COLUMN later text")
    store = store_of(url)
    assert store.aliases() == {"plain": "docs"}
    assert store.why_not_flip("unused") == ""
    assert "is itself a table: rename it" in store.why_not_flip("docs")
    for name in others:
        assert "is a view that does more than give a table another name" in store.why_not_flip(name)
    with pytest.raises(BulkError, match="is itself a table"):
        store.flip("docs", "docs")
    store.close()


def test_a_server_that_is_away_is_an_error_of_the_job(base: str, sql: psycopg.Connection, url: str) -> None:
    with pytest.raises(BulkError, match=r"pgvector://me@127.0.0.1:1/x cannot be reached, or has gone away"):
        open_url("pgvector://me@127.0.0.1:1/x/docs")
    write(url, [row(1, "a")])
    store = store_of(url)
    for ask in (
        store.collections,
        lambda: store.delete_ids("docs", [9]),
        lambda: store.vectors("docs", [1]),
        lambda: store.search("docs", vector_of("a"), 1),
        lambda: store.flip("view", "docs"),
        store.aliases,
    ):
        cut_off(sql)
        ask()
    assert store.describe("docs").count == 1
    store.close()
    store = store_of(url)
    with pytest.raises(BulkError, match="there is no table `gone`"):
        store.source("gone", FieldNames())
    store.close()
    with pytest.raises(BulkError, match="--text body: no such field"):
        read(url, FieldNames(text="body"))


def cut_off(sql: psycopg.Connection) -> None:
    """End all connections of the gateway, as a server does that restarts."""
    sql.execute(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'embedding-gateway'"
    )


@pytest.mark.usefixtures("_small_pages")
def test_a_server_that_restarts_does_not_end_a_job(url: str, sql: psycopg.Connection) -> None:
    store, collection = open_url(url)
    with closing(store), closing(store.sink(collection, SinkOptions())) as sink:
        sink.open(NOTE)
        for n in range(10):
            cut_off(sql)
            sink.write(n, embedded([row(n, f"text {n}")]))
        source = store.source(collection, FieldNames())
        ids = []
        for found in source.read():
            cut_off(sql)
            ids.append(getattr(found, "id", None))
        assert ids == list(range(10))
        assert source.count() == 10
        source.close()
        cut_off(sql)
        digests = store.digests(collection)
        next(digests)
        cut_off(sql)
        assert len(list(digests)) == 9
        assert len(store.digests_of(collection, [1, 2])) == 2


def test_a_server_that_stays_away_ends_the_work(postgres: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.bulk.stores.pgvector_session.PATIENCE_S", 0.3)
    addresses = [postgres]

    def connect() -> psycopg.Connection:
        with refusals("the store"):
            return psycopg.connect(addresses.pop() if addresses else "postgresql://127.0.0.1:1/x", autocommit=True)

    def ask(connection: psycopg.Connection) -> None:
        asked.append(connection)
        with refusals("the store"):
            connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    asked: list[psycopg.Connection] = []
    session = Session(connect)
    with pytest.raises(BulkError, match="the store cannot be reached, or has gone away"):
        session.call(ask)
    assert len(asked) == 1
    session.close()


def test_a_request_that_a_server_refuses_is_not_repeated(postgres: str) -> None:
    session = Session(lambda: psycopg.connect(postgres, autocommit=True))
    asked = []

    def ask(connection: psycopg.Connection) -> None:
        asked.append(connection)
        with refusals("the store"):
            connection.execute("SELECT 1 FROM gone")

    with pytest.raises(BulkError, match="PostgreSQL rejects the request"):
        session.call(ask)
    assert len(asked) == 1
    session.close()


def test_the_loser_of_a_deadlock_tries_again(postgres: str, sql: psycopg.Connection) -> None:
    sql.execute("CREATE TABLE a (); CREATE TABLE b ()")
    session = Session(lambda: psycopg.connect(postgres, autocommit=True))
    session.connection.execute("SET deadlock_timeout = '20ms'")  # it notices first, so it is the one that ends
    attempts = []

    def work(connection: psycopg.Connection) -> None:
        attempts.append(connection)
        with refusals("the store"), connection.transaction():
            connection.execute("LOCK TABLE b")
            if len(attempts) == 1:
                other.start()
                wait_until_blocked()
            connection.execute("LOCK TABLE a")

    def lock_both() -> None:
        with sql.transaction():
            sql.execute("LOCK TABLE a")
            sql.execute("LOCK TABLE b")

    def wait_until_blocked() -> None:
        with psycopg.connect(postgres, autocommit=True) as watching:
            while not watching.execute("SELECT 1 FROM pg_locks WHERE NOT granted").fetchone():
                pass

    other = threading.Thread(target=lock_both)
    session.call(work)
    other.join()
    assert len(attempts) == 2
    session.close()


def test_a_server_that_has_lost_its_network_is_noticed_within_a_minute(url: str) -> None:
    """By default, a connection waits two hours for it."""
    with closing(store_of(url)) as store:
        settings = store._connection.info.get_parameters()
    unanswered = [int(settings[name]) for name in ("keepalives_idle", "keepalives_interval", "keepalives_count")]
    assert unanswered[0] + unanswered[1] * unanswered[2] <= 60
    assert 0 < int(settings["tcp_user_timeout"]) <= 60_000


def test_a_new_table_has_no_other_id_column(pgvector_url: str) -> None:
    """It would have the column ``id``, whatever the URL says."""
    with pytest.raises(
        BulkError, match=r"does not exist, and a new table has its ids in the column `id`: leave out \?id=key"
    ):
        write(f"{pgvector_url}?id=key", [Row(1, "a", {}, "1", None)])


def sink_of(url: str, options: SinkOptions) -> PgvectorSink:
    with closing(store_of(url)) as store:
        sink = store.sink("docs", options)
    assert isinstance(sink, PgvectorSink)
    sink.open(NOTE)
    return sink


def test_a_row_that_a_trigger_drops_is_refused_by_a_guarded_write(url: str, sql: psycopg.Connection) -> None:
    write(url, [row("a", "one")])
    sql.execute("CREATE FUNCTION drop_x() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$")
    sql.execute("CREATE TRIGGER t BEFORE INSERT ON docs FOR EACH ROW WHEN (new.id = 'x') EXECUTE FUNCTION drop_x()")
    with closing(sink_of(url, SinkOptions())) as sink:
        with pytest.raises(RowsRefused, match="shows no row with its id: a trigger or a policy prevents it") as refused:
            sink.write_guarded(0, embedded([row("x", "two"), row("b", "three")]), lambda _found: set())
        assert [bad.id for bad in refused.value.rows] == ["x"]
        sink.write_guarded(0, embedded([row("b", "three")]), lambda _found: set())
    assert value(sql, "SELECT string_agg(id, ' ' ORDER BY id) FROM docs") == "a b"


def test_rows_that_a_guard_keeps_are_not_among_the_refused(url: str, sql: psycopg.Connection) -> None:
    """The row that is kept would have made room for the one that is refused."""
    sql.execute("CREATE TABLE docs (id text PRIMARY KEY, text text, email text UNIQUE, embedding vector)")
    sql.execute("INSERT INTO docs (id, email) VALUES ('a', 'z')")
    rows = [row("a", "one", {"email": "x"}), row("b", "two", {"email": "z"}), row("c", "three")]
    with closing(sink_of(url, SinkOptions("text", None, adopts=True))) as sink, pytest.raises(RowsRefused) as refused:
        sink.write_guarded(0, embedded(rows), lambda _found: {"a"})
    assert [bad.id for bad in refused.value.rows] == ["b"]


def test_ids_that_an_identity_has_given_out_are_not_given_out_again(url: str, sql: psycopg.Connection) -> None:
    """An application has deleted its newest row, or has not ended its transaction yet."""
    sql.execute("CREATE TABLE docs (id int GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, v vector(4), text text)")
    sql.execute("INSERT INTO docs (text) VALUES ('a'), ('b'), ('c')")
    sql.execute("DELETE FROM docs WHERE id > 1")
    write(url, [row(1, "changed"), row(2, "of another program")], NOTE, SinkOptions(adopts=True))
    assert value(sql, "INSERT INTO docs (text) VALUES ('d') RETURNING id") == 4


@pytest.mark.parametrize(
    "index",
    [
        "hnsw ((v::halfvec(4)) halfvec_l2_ops)",
        "hnsw ((binary_quantize(v)::bit(4)) bit_hamming_ops)",
        "ivfflat (v vector_ip_ops)",
    ],
)
def test_a_copy_of_a_table_with_an_index_of_an_expression_takes_vectors_of_another_width(
    index: str, url: str, sql: psycopg.Connection
) -> None:
    sql.execute("CREATE TABLE docs (id bigint PRIMARY KEY, v vector(4), text text)")
    sql.execute(f"CREATE INDEX ON docs USING {index}")  # type: ignore[arg-type]
    write(url.replace("docs", "new"), [row(1, "a")], WIDE, SinkOptions(like="docs"))
    indexes = str(
        value(sql, "SELECT string_agg(indexdef, ';') FROM pg_indexes WHERE tablename = 'new' AND indexdef ~ ' v'")
    )
    metric = next((metric for metric in ("l2", "ip") if f"_{metric}_" in index), "cosine")
    assert indexes.endswith(f"USING hnsw (v vector_{metric}_ops)")
    assert ";" not in indexes


def test_a_copy_with_fewer_dimensions_has_the_index_that_pgvector_does_not_support_for_the_original(
    url: str, sql: psycopg.Connection
) -> None:
    sql.execute("CREATE TABLE docs (id bigint PRIMARY KEY, v vector(3072), text text)")
    write(url.replace("docs", "new"), [row(1, "a")], WIDE, SinkOptions(like="docs"))
    indexes = str(value(sql, "SELECT string_agg(indexdef, ';') FROM pg_indexes WHERE tablename = 'new'"))
    assert "USING hnsw (v vector_cosine_ops)" in indexes


@pytest.mark.parametrize(
    ("indexes", "expected"),
    [
        (
            ["hnsw (v vector_cosine_ops) WITH (m=32, ef_construction=200) WHERE n > 3", "hnsw (v vector_l2_ops)"],
            ["hnsw (v vector_cosine_ops) WITH (m='32', ef_construction='200') WHERE (n > 3)", "hnsw (v vector_l2_ops)"],
        ),
        ([], []),
    ],
)
def test_a_copy_has_the_settings_of_the_indexes(
    indexes: list[str], expected: list[str], url: str, sql: psycopg.Connection
) -> None:
    sql.execute("CREATE TABLE docs (id bigint PRIMARY KEY, v vector(4), text text, n int)")
    for index in indexes:
        sql.execute(f"CREATE INDEX ON docs USING {index}")  # type: ignore[arg-type]

    write(url.replace("docs", "new"), [row(1, "a")], WIDE, SinkOptions(like="docs"))

    found = sql.execute("SELECT indexdef FROM pg_indexes WHERE tablename = 'new' AND indexdef ~ '[(]v ' ORDER BY 1")
    assert [definition.partition("USING ")[2] for (definition,) in found] == expected


@contextmanager
def roles(sql: psycopg.Connection, *names: str) -> Iterator[None]:
    """Create roles, and drop them with everything that they own."""
    drop = "; ".join(f"DROP OWNED BY {name}; DROP ROLE {name}" for name in names)
    sql.execute("; ".join(f"CREATE ROLE {name} LOGIN; GRANT ALL ON SCHEMA public TO {name}" for name in names).encode())
    try:
        yield
    finally:
        sql.execute(drop.encode())


def seen_by(postgres: str, role: str, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(postgres, autocommit=True) as application:
        application.execute(f"SET ROLE {role}".encode())
        return application.execute(query.encode()).fetchall()


TENANTS = """
CREATE TABLE docs (id bigint PRIMARY KEY, v vector(4), text text, tenant text);
INSERT INTO docs VALUES (1, '[1,2,3,4]', 'a', 'ada'), (2, '[1,2,3,4]', 'b', 'ben');
ALTER TABLE docs OWNER TO shop; GRANT SELECT, INSERT ON docs TO ada, PUBLIC; ALTER TABLE docs ENABLE ROW LEVEL SECURITY;
CREATE POLICY "own rows" ON docs TO ada, ben USING (tenant = current_user AND text NOT LIKE '%x');
CREATE POLICY no_odd ON docs AS RESTRICTIVE FOR INSERT WITH CHECK (id % 2 = 0);
CREATE VIEW all_docs AS SELECT * FROM docs; ALTER VIEW all_docs OWNER TO shop; GRANT SELECT ON all_docs TO ada;
"""


def test_a_copy_shows_each_role_the_same_rows(url: str, postgres: str, sql: psycopg.Connection) -> None:
    """Otherwise each tenant with grants on the table would see the rows of all tenants in its copy."""
    with roles(sql, "shop", "ada", "ben", "eve"):
        sql.execute(TENANTS.encode())
        rows = [found for found in read(url) if isinstance(found, Row)]
        write(url.replace("docs", "new"), rows, WIDE, SinkOptions(like="docs"))
        with closing(store_of(url)) as store:
            store.flip("all_docs", "new")

        for table in ("docs", "new"):
            assert [seen_by(postgres, role, f"SELECT id FROM {table}") for role in ("ada", "ben", "eve")] == [  # noqa: S608
                [(1,)],
                [(2,)],
                [],
            ]
            with pytest.raises(psycopg.errors.InsufficientPrivilege, match="policy"):
                seen_by(postgres, "ada", f"INSERT INTO {table} (id, tenant, text) VALUES (3, 'ada', 'c') RETURNING id")  # noqa: S608
        assert seen_by(postgres, "ada", "SELECT id FROM all_docs ORDER BY id") == [(1,), (2,)], "as before the flip"


def test_a_policy_that_cannot_be_copied_is_named(url: str, sql: psycopg.Connection) -> None:
    sql.execute("CREATE TABLE docs (id bigint PRIMARY KEY, v vector(4), text text, tenant int)")
    sql.execute("CREATE TABLE members (tenant int, name text); ALTER TABLE docs ENABLE ROW LEVEL SECURITY")
    sql.execute("CREATE POLICY p ON docs USING (EXISTS (SELECT FROM members m WHERE m.tenant = docs.tenant))")
    with pytest.raises(BulkError, match=r"the policy `p` of .*docs cannot be copied: .* name it with --into"):
        write(url.replace("docs", "new"), [], WIDE, SinkOptions(like="docs"))
    assert value(sql, "SELECT to_regclass('new')") is None


def test_rows_that_a_policy_hides_are_not_left_behind(base: str, sql: psycopg.Connection) -> None:
    """A move that sees some rows only would delete the others with the old table."""
    with roles(sql, "shop", "ada", "ben"):
        sql.execute(TENANTS.encode())
        sql.execute("GRANT shop TO ada; ALTER TABLE docs FORCE ROW LEVEL SECURITY")
        as_ada = f"{base.replace('postgres@', 'ada@')}/docs"
        assert as_ada != f"{base}/docs"
        with closing(store_of(as_ada)) as store:
            for look in (store.describe, lambda name: list(store.digests(name))):
                with pytest.raises(BulkError, match=r"would be affected by row-level security policy for table .docs"):
                    look("docs")
        assert by_id(as_ada).keys() == {1}, "a role may embed what it sees"


def test_grants_of_columns_are_kept(url: str, postgres: str, sql: psycopg.Connection) -> None:
    with roles(sql, "app"):
        sql.execute('CREATE TABLE docs (id bigint PRIMARY KEY, v vector(4), text text, "a b%" text)')
        sql.execute("CREATE VIEW live AS SELECT * FROM docs")
        for name in ("docs", "live"):
            sql.execute(f'GRANT SELECT (id, "a b%"), UPDATE ("a b%") ON {name} TO app'.encode())
        write(url.replace("docs", "new"), [row(1, "a")], WIDE, SinkOptions(like="docs"))
        with closing(store_of(url)) as store:
            store.flip("live", "new")
        for name in ("new", "live"):
            assert seen_by(postgres, "app", f'UPDATE {name} SET "a b%" = \'x\' RETURNING id, "a b%"') == [(1, "x")]  # noqa: S608
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                seen_by(postgres, "app", f"SELECT text FROM {name}")  # noqa: S608


@pytest.mark.parametrize(
    ("statement", "user"),
    [
        ("CREATE VIEW report AS SELECT id FROM plain", "report"),
        ("CREATE MATERIALIZED VIEW report AS SELECT count(*) FROM plain", "report"),
        ("CREATE FUNCTION found() RETURNS SETOF plain LANGUAGE sql AS $$ SELECT * FROM plain $$", "function found()"),
        ("CREATE TRIGGER mine INSTEAD OF UPDATE ON plain FOR EACH ROW EXECUTE FUNCTION stamp()", "trigger mine"),
        ("ALTER VIEW plain ALTER COLUMN text SET DEFAULT 'new'", "default value for column text"),
        ("CREATE RULE r AS ON DELETE TO plain DO INSTEAD NOTHING", "rule r"),
    ],
)
def test_a_view_that_others_use_is_not_redirected(statement: str, user: str, url: str, sql: psycopg.Connection) -> None:
    """It would be lost with the old view, or make the flip fail at the end of a long move."""
    sql.execute(
        "CREATE TABLE docs (id bigint PRIMARY KEY, v vector(4), text text); CREATE VIEW plain AS SELECT * FROM docs"
    )
    sql.execute("CREATE FUNCTION stamp() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN new; END $$")
    with closing(store_of(url)) as store:
        assert store.why_not_flip("plain") == ""
        sql.execute(statement.encode())
        reason = store.why_not_flip("plain")
        assert reason.startswith("`plain` would lose `")
        assert user in reason
        with pytest.raises(BulkError, match="drop that first, and create it again after the flip"):
            store.flip("plain", "docs")
        if user == "report":
            assert "is a view that does more" in store.why_not_flip("report")


def test_vectors_that_are_not_normalized_are_compared_by_their_dot_product(url: str, sql: psycopg.Connection) -> None:
    note = replace(NOTE, is_normalized=False)
    write(url, [row(1, "a")], note)
    write(url, [row(1, "a")], replace(WIDE, is_normalized=False), SinkOptions(vector="wide", updates=True))
    for vector in ("embedding", "wide"):
        found = str(value(sql, f"SELECT indexdef FROM pg_indexes WHERE tablename = 'docs' AND indexdef ~ '{vector}'"))  # noqa: S608
        assert found.endswith(f"USING hnsw ({vector} vector_ip_ops)")


def test_after_a_flip_no_row_gets_the_id_of_a_row_that_is_not_copied_yet(url: str, sql: psycopg.Connection) -> None:
    """An application writes between the last pass and the flip."""
    sql.execute("CREATE TABLE docs (id int GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, v vector(4), text text)")
    sql.execute("CREATE VIEW live AS SELECT * FROM docs; INSERT INTO live (text) VALUES ('a'), ('b')")
    write(url.replace("docs", "new"), [row(1, "a"), row(2, "b")], WIDE, SinkOptions(like="docs"))
    sql.execute("INSERT INTO live (text) VALUES ('c'), ('d')")
    with closing(store_of(url)) as store:
        store.flip("live", "new")
        assert value(sql, "INSERT INTO live (text) VALUES ('e') RETURNING id") == 5
        store.flip("live", "docs")
        assert value(sql, "INSERT INTO live (text) VALUES ('f') RETURNING id") == 6
