"""Files as a source: formats, places, positions, and the errors for bad ones."""

from __future__ import annotations

import gzip
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gateway.bulk.fields import FieldNames
from gateway.bulk.files import lines
from gateway.bulk.files.source import FileSource, open_files
from gateway.bulk.rows import BadRow, BulkError, Row

RECORDS = [{"id": f"d{i}", "text": f"text {i}", "n": i} for i in range(7)]


def write_jsonl(path: Path, records: Sequence[Mapping[str, Any]] = RECORDS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(orjson.dumps(record) + b"\n" for record in records))
    return path


def write_csv(path: Path) -> Path:
    rows = [f'{one["id"]},"text\n, ""{one["n"]}""",{one["n"]}' for one in RECORDS]
    path.write_text("\n".join(["id,text,n", *rows]) + "\n")
    return path


def write_parquet(path: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(RECORDS), path, row_group_size=2)
    return path


def write_gzip(path: Path) -> Path:
    path.write_bytes(gzip.compress(write_jsonl(path.with_suffix("")).read_bytes()))
    path.with_suffix("").unlink()
    return path


def write_as(path: Path, records: Sequence[Mapping[str, str]]) -> Path:
    """Write records in the format of a name."""
    path.parent.mkdir()
    match path.suffix:
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(list(records)), path)
        case ".csv":
            lines = [",".join(one) for one in (records[0].keys(), *(record.values() for record in records))]
            path.write_text("\n".join(lines))
        case _:
            write_jsonl(path, records)
    return path


WRITERS: Mapping[str, Callable[[Path], Path]] = {
    "docs.jsonl": write_jsonl,
    "docs.csv": write_csv,
    "docs.parquet": write_parquet,
    "docs.jsonl.gz": write_gzip,
}


def opened(*places: Path | str, **names: Any) -> FileSource:
    return open_files([str(place) for place in places], FieldNames(**names))


def rows_of(source: FileSource) -> list[Row]:
    rows = list(source.read())
    assert all(isinstance(row, Row) for row in rows), rows
    return rows  # type: ignore[return-value]


@pytest.mark.parametrize("name", WRITERS)
def test_each_format_gives_its_rows_and_continues_after_any_of_them(name: str, tmp_path: Path) -> None:
    source = opened(WRITERS[name](tmp_path / name))
    rows = rows_of(source)
    is_csv = name == "docs.csv"
    assert [row.id for row in rows] == [one["id"] for one in RECORDS]
    assert rows[3].text == ('text\n, "3"' if is_csv else "text 3")
    assert rows[3].payload == {"n": "3" if is_csv else 3}
    for index, row in enumerate(rows):
        assert list(source.read(row.position)) == rows[index + 1 :]
    assert source.count() in {7, 14, None}  # the lines of a quoted field count as well


def test_a_place_names_the_line(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "docs.csv")
    assert [row.place for row in rows_of(opened(path))][:3] == [f"{path}:{line}" for line in (2, 4, 6)]


def test_folders_and_patterns_are_read_in_the_order_of_names(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", RECORDS[:2])
    write_jsonl(tmp_path / "a" / "z.jsonl", RECORDS[2:4])
    write_jsonl(tmp_path / "_manifest.json")
    (tmp_path / "README.md").write_text("not a source")
    expected = ["d2", "d3", "d0", "d1"]
    assert [row.id for row in rows_of(opened(tmp_path))] == expected
    assert [row.id for row in rows_of(opened(f"{tmp_path}/**/*.jsonl"))] == expected
    assert [row.id for row in rows_of(opened(tmp_path / "b.jsonl", tmp_path / "a"))] == ["d0", "d1", "d2", "d3"]


def test_rows_without_ids_get_the_same_ones_wherever_the_folder_is(tmp_path: Path) -> None:
    ids = []
    for folder in ("one", "two"):
        write_jsonl(tmp_path / folder / "x.jsonl", [{"text": "same"}, {"text": "same"}])
        write_jsonl(tmp_path / folder / "y.jsonl", [{"text": "same"}])
        source = opened(tmp_path / folder)
        assert source.has_unique_ids
        ids.append([row.id for row in rows_of(source)])
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == 3


def test_rows_without_ids_keep_them_when_a_folder_gets_more_files(tmp_path: Path) -> None:
    """Otherwise the rows of January would be in a store twice from February on."""
    january = write_jsonl(tmp_path / "data" / "01" / "x.jsonl", [{"text": "one"}])
    places: list[list[str | Path]] = [
        [tmp_path / "data"],
        [f"{tmp_path}/data/"],
        [f"file://{tmp_path}/data"],
        [f"{tmp_path}/data/*/*.jsonl"],
        [f"{tmp_path}/data/**/*.jsonl"],
    ]
    before = [rows_of(opened(*place)) for place in places]
    write_jsonl(tmp_path / "data" / "02" / "x.jsonl", [{"text": "two"}])
    write_jsonl(tmp_path / "data" / "y.jsonl", [{"text": "three"}])

    for place, [row] in zip(places, before, strict=True):
        assert row.id == before[0][0].id
        assert row.id in [later.id for later in rows_of(opened(*place))]
    assert [row.id for row in rows_of(opened(january))] != [before[0][0].id], (
        "as an only file, it has no folder in its name"
    )


def test_a_file_whose_name_is_not_utf8_is_refused(tmp_path: Path) -> None:
    """An old archive has such names; an id, a message and the list of errors cannot contain them."""
    name = os.fsdecode(b"caf\xe9.jsonl")
    write_jsonl(tmp_path / name, [{"text": "one"}])
    for place in (tmp_path, tmp_path / name):
        with pytest.raises(BulkError, match=r"caf\\xe9\.jsonl: its name is not UTF-8: rename it"):
            opened(place)


@pytest.mark.parametrize("name", ["part.jsonl", "part.csv", "part.parquet"])
def test_rows_without_ids_of_files_with_one_name_do_not_replace_each_other(name: str, tmp_path: Path) -> None:
    """Two jobs, with one file each, write into one collection; then a third job reads a copy of the first file."""
    records = [{"text": f"text {i}", "lang": lang} for i in range(3) for lang in ("en", "de")]
    ids = []
    for folder, some in (("a", records[::2]), ("b", records[1::2]), ("c", records[::2])):
        path = write_as(tmp_path / folder / name, some)
        ids.append([row.id for row in rows_of(opened(path, payload=("lang",)))])
        assert ids[-1] == [row.id for row in rows_of(opened(path, payload=()))], "the fields to keep do not matter"
    assert not set(ids[0]) & set(ids[1])
    assert ids[0] == ids[2]


def test_a_fingerprint_changes_with_the_content_and_the_names_only(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "one" / "docs.jsonl")
    before = opened(path).fingerprint()
    assert opened(path.rename(tmp_path / "docs.jsonl")).fingerprint() == before
    path = tmp_path / "docs.jsonl"
    path.write_bytes(path.read_bytes().replace(b"text 6", b"text 9"))
    assert opened(path).fingerprint() != before


def test_a_file_that_is_written_while_it_is_read_stops_the_reading(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "docs.jsonl")
    source = opened(path)
    source.fingerprint()
    reading = source.read()
    next(reading)
    with path.open("ab") as file:
        file.write(b'{"id": "new", "text": "late"}\n')
    with pytest.raises(BulkError, match=r"docs\.jsonl: was modified while it was being read"):
        list(reading)


def test_old_vectors_of_parquet_are_left_out(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([{"id": 1, "text": "x", "vector": [0.5, 1.0], "lang": "en"}])
    pq.write_table(table, tmp_path / "docs.parquet")
    assert rows_of(opened(tmp_path))[0].payload == {"lang": "en"}


def test_dates_and_decimals_of_parquet_become_text(tmp_path: Path) -> None:
    import datetime
    import decimal

    record = {
        "id": 1,
        "text": "x",
        "at": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
        "price": decimal.Decimal("1.50"),
        "nested": {"day": datetime.date(2026, 1, 2)},
    }
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "docs.parquet")
    payload = rows_of(opened(tmp_path))[0].payload
    assert payload == {"at": "2026-01-02T00:00:00+00:00", "price": "1.50", "nested": {"day": "2026-01-02"}}


def test_files_of_another_filesystem_are_read(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bulk-read/a.jsonl", write_jsonl(tmp_path / "a.jsonl").read_bytes())
    memory.pipe_file("/bulk-read/b.parquet", write_parquet(tmp_path / "b.parquet").read_bytes())
    source = opened("memory://bulk-read")
    rows = rows_of(source)
    assert [row.id for row in rows] == 2 * [one["id"] for one in RECORDS]
    assert list(source.read(rows[9].position)) == rows[10:]
    assert rows[0].place == "memory://bulk-read/a.jsonl:1"
    before = source.fingerprint()
    memory.pipe_file("/bulk-read/a.jsonl", b'{"id": 1, "text": "other"}\n')
    assert opened("memory://bulk-read/*").fingerprint() != before


@pytest.fixture
def short_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the limit of a line small, and reading beyond it happen in small pieces."""
    for module in ("lines", "records"):
        monkeypatch.setattr(f"gateway.bulk.files.{module}.MAX_LINE_BYTES", 60)
    monkeypatch.setattr(lines.read_lines, "__defaults__", (60,))
    monkeypatch.setattr(lines, "_CHUNK_BYTES", 16)


BAD_LINES = {
    b'{"id": 1, "text"': "is not JSON: ",
    b"[1, 2]": "must be a JSON object, got a list",
    b"null": "must be a JSON object, got nothing",
    b'{"id": 2, "text": "\xff"}': "is not UTF-8: invalid start byte at byte 20",
    b'{"id": 3, "text": "\\ud800"}': "is not JSON: ",
    b'{"id": 4}': "the text in field `text` is missing",
    b'{"id": 5, "text": "' + 100 * b"long " + b'"}': "the line has more than 16 MiB, which is the limit",
    b'{"id": 6, "text": NaN}': "is not JSON: ",
}


@pytest.mark.usefixtures("short_lines")
def test_a_bad_line_is_named_and_does_not_touch_its_neighbors(tmp_path: Path) -> None:
    path = tmp_path / "docs.jsonl"
    good = b'{"id": "good", "text": "x"}\n'
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\n" + b"".join(line + b"\r\n" + good for line in BAD_LINES))
    read = list(opened(path).read())
    bad = [one for one in read if isinstance(one, BadRow)]
    assert [one.place for one in bad] == [f"{path}:{3 + 2 * i}" for i in range(len(BAD_LINES))]
    assert len(read) == 2 * len(BAD_LINES) + 1
    for one, problem in zip(bad, BAD_LINES.values(), strict=True):
        assert problem in one.problem
        assert list(opened(path).read(one.position)) == read[read.index(one) + 1 :]


def test_integers_of_any_size_are_read_exactly(tmp_path: Path) -> None:
    path = tmp_path / "docs.jsonl"
    numbers = [2**53 + 1, 2**63, 2**64, -(2**63) - 1, 10**40 + 1, 0.1]
    path.write_bytes(
        b"".join(orjson.dumps({"id": i, "text": "a"})[:-1] + f', "n": {n}}}\n'.encode() for i, n in enumerate(numbers))
    )
    path.write_bytes(
        path.read_bytes() + b'{"id": ' + b"9" * 30 + b', "text": "a"}\n{"text": "a", "n": ' + b"9" * 4301 + b"}\n"
    )

    *rows, large, bad = opened(path).read()

    assert [row.payload["n"] for row in rows if isinstance(row, Row)] == numbers
    assert large.id == int("9" * 30)
    assert isinstance(bad, BadRow)


def test_a_file_may_begin_with_many_bad_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_text("no JSON\n" * 300 + '{"id": 1, "text": "a"}\n')

    rows = list(open_files([str(path)], FieldNames()).read())

    assert [type(row) for row in rows] == [BadRow] * 300 + [Row]
    monkeypatch.setattr("gateway.bulk.files.source._MAX_BAD_RECORDS", 300)
    with pytest.raises(BulkError, match=r"docs.jsonl:1: is not JSON: .*\. All of the first 300 records are bad"):
        open_files([str(path)], FieldNames())


def test_the_longest_line_is_read_and_one_byte_more_is_not() -> None:
    import io

    for ending in (b"\n", b"\r\n", b""):
        for size, is_read in ((60, True), (61, False), (62, False), (63, False), (200, False)):
            file = io.BytesIO(size * b"x" + ending + (b"next" if ending else b""))
            first, *others = lines.read_lines(file, lines.Mark(), 60)
            assert (first.content == size * b"x") is is_read, (size, ending)
            assert [other.content for other in others] == ([b"next"] if ending else [])


@pytest.mark.usefixtures("short_lines")
def test_a_bad_csv_record_is_named_and_does_not_touch_its_neighbors(tmp_path: Path) -> None:
    path = tmp_path / "docs.csv"
    lines_ = [
        b"id,text",
        b'a,"fine',
        b'over two lines"',
        b"b,one,too many",
        b'c,"quote that never ends',
        b"d,fine",
        b"",
        b'e,"wrong"quote',
        b"f,\xff",
        b"g," + 100 * b"long",
        b"h,last",
        b"i,later",
    ]
    path.write_bytes(b"\n".join(lines_))
    read = list(opened(path).read())
    assert [one.id for one in read if isinstance(one, Row)] == ["a", "d", "h", "i"]
    problems = {one.place.rpartition(":")[2]: one.problem for one in read if isinstance(one, BadRow)}
    assert problems == {
        "4": "has 3 columns, but the first line names 2",
        "5": "a quoted field that begins here is not closed (is not CSV: ',' expected after '\"')",
        "8": "is not CSV: ',' expected after '\"'",
        "9": "is not UTF-8: invalid start byte at byte 3",
        "10": "the line has more than 16 MiB, which is the limit",
    }
    for index, one in enumerate(read):
        assert list(opened(path).read(one.position)) == read[index + 1 :]


def test_line_ends_inside_quotes_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "docs.csv"
    path.write_bytes(b'id,text,note\r\n1,"a\r\nb","c\nd"\r\n2,x,"y\r\n"\r\n3,last,')
    rows = rows_of(opened(path))
    assert [(row.id, row.text, row.payload["note"]) for row in rows] == [
        ("1", "a\r\nb", "c\nd"), ("2", "x", "y\r\n"), ("3", "last", ""),
    ]  # fmt: skip


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_the_header_of_a_csv_file_tells_its_separator(separator: str, tmp_path: Path) -> None:
    path = tmp_path / "docs.csv"
    path.write_text(f"id{separator}text\n1{separator}a, b\n")
    assert [(row.id, row.text) for row in rows_of(opened(path))] == [("1", "a, b")]


def test_a_delimiter_inside_a_quoted_name_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "docs.csv"
    path.write_text('id,"a;b;c;d",text\n1,x,hello\n')
    [row] = rows_of(opened(path))
    assert (row.id, row.text, row.payload) == ("1", "hello", {"a;b;c;d": "x"})


def _pipe(path: Path) -> None:
    import os

    os.mkfifo(path)


UNUSABLE: Mapping[str, tuple[bytes | Callable[[Path], Any], str]] = {
    "a.jsonl": (b'[{"id": 1}]', "is a JSON array, but must be JSON lines, an object per line: jq -c '.[]'"),
    "b.json": (b'{\n "id": 1}', "is JSON over several lines, but must be JSON lines"),
    "c.jsonl": ("﻿{}".encode("utf-16"), "is UTF-16, but must be UTF-8: iconv"),
    "d.jsonl": (b"\n", "no records found"),
    "e.jsonl": (b"oops\n", "e.jsonl:1: is not JSON"),
    "f.csv": (b"", "is empty; the first line must contain the column names"),
    "g.csv": (b"id,text,id\n", "g.csv:1: two columns are called `id`"),
    "h.csv": (b"id,,text\n", "h.csv:1: a column has no name"),
    "i.csv": (b'"id,text\n', "i.csv:1: is not a line of column names"),
    "j.csv": (b"id,t\xe9xt\n", "j.csv:1: is not UTF-8: invalid continuation byte at byte 5"),
    "k.parquet": (b"PAR1 not really", "k.parquet: is not a Parquet file"),
    "l.txt": (b"text", "l.txt: its name must end in .jsonl"),
    "m.jsonl.gz": (b"not packed", "m.jsonl.gz: cannot be read: Not a gzipped file"),
    "n.jsonl": (_pipe, "n.jsonl: cannot be read: must be a regular file, but is a named pipe"),
    "p.jsonl": (gzip.compress(b'{"id": 1}'), "p.jsonl: is compressed with gzip: add .gz to its name"),
    "q.csv": (gzip.compress(b"id,text"), "q.csv: is compressed with gzip: add .gz to its name"),
    "r.csv": ("\ufeffid,text\n".encode("utf-16-le"), "r.csv: is UTF-16, but must be UTF-8: iconv"),
    "s.csv": (b"id,text\r1,a\r", r"s.csv: its lines end in a carriage return alone: tr '\r' '\n' < "),
    "t.json": (b'{ \n "id": 1}', "is JSON over several lines, but must be JSON lines"),
    "o.jsonl.gz": (gzip.compress(b'{"id": 1}\n' * 9)[:-9], "o.jsonl.gz: cannot be read: Compressed file ended"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_file_that_cannot_be_a_source_says_why(name: str, tmp_path: Path) -> None:
    content, problem = UNUSABLE[name]
    if callable(content):
        content(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BulkError) as caught:
        list(opened(tmp_path / name).read())
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("places", "problem"),
    [
        (["{}/absent.jsonl"], "absent.jsonl: no such file or folder"),
        (["{}/*.csv"], "no file name ends in .jsonl"),
        (["{}/empty"], "empty: no file name ends in .jsonl, "),
        (["{}/docs.jsonl", "{}/*.jsonl"], "docs.jsonl: is named twice in the sources"),
        (["s3://bucket/docs.jsonl"], "needs a package that is not installed: Install s3fs"),
        (["nowhere://bucket/docs.jsonl"], "nowhere://bucket/docs.jsonl: cannot be opened: ValueError: Protocol not known"),
        (["memory://nothing/here.jsonl"], "memory://nothing/here.jsonl: no such file or folder"),
        (["{}/" + 300 * "x" + ".jsonl"], "no such file or folder"),
    ],
)  # fmt: skip
def test_a_place_without_files_says_so(places: Sequence[str], problem: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "docs.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BulkError) as caught:
        opened(*(place.format(tmp_path) for place in places))
    assert problem in str(caught.value)


def test_bytes_of_parquet_are_refused_unless_they_are_left_out(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"id": 1, "text": "x", "image": b"\x00"}]), tmp_path / "docs.parquet")
    with pytest.raises(
        BulkError, match=r"column `image` has bytes, which no sink can store: .* name the columns to keep"
    ):
        opened(tmp_path)
    with pytest.raises(BulkError, match=r"column `image` has bytes"):
        opened(tmp_path, payload=("image",))
    [row] = rows_of(opened(tmp_path, payload=("text",)))
    assert (row.id, row.payload) == (1, {"text": "x"})
    records = [{"text": "x", "image": image} for image in (b"\x00", b"\x01")]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "docs.parquet")
    rows = rows_of(opened(tmp_path, payload=()))
    assert len({row.id for row in rows}) == 2
    assert [row.payload for row in rows] == [{}, {}]


def test_two_columns_of_a_name_are_refused(tmp_path: Path) -> None:
    arrays = [pa.array(["a"]), pa.array(["one"]), pa.array(["two"])]
    pq.write_table(pa.Table.from_arrays(arrays, names=["id", "text", "text"]), tmp_path / "docs.parquet")
    with pytest.raises(BulkError, match=r"two columns are called `text`; rename or remove one of them"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        pytest.param(pa.array([10**15, 0], pa.timestamp("s")), "1970-01-01T00:00:00", id="date"),
        pytest.param(pa.array([2**30, 0], pa.date32()), "1970-01-01", id="day"),
        pytest.param(
            pa.StructArray.from_arrays([pa.array([1, 1]), pa.array([2, 2])], ["x", "x"], mask=pa.array([False, True])),
            None,
            id="names twice",
        ),
    ],
)
def test_a_value_that_cannot_be_read_is_a_bad_row_and_does_not_touch_its_neighbors(
    tmp_path: Path, bad: pa.Array, good: object
) -> None:
    names = ["id", "text", "at"]
    pq.write_table(
        pa.Table.from_arrays([pa.array([1, 2]), pa.array(["a", "b"]), bad], names=names), tmp_path / "d.parquet"
    )
    first, second = opened(tmp_path).read()
    assert isinstance(first, BadRow)
    assert "the value in column `at` cannot be read: " in first.problem
    assert isinstance(second, Row)
    assert second.payload == {"at": good}


def random_bytes(rng: random.Random) -> Iterator[bytes]:
    pieces = [
        b'{"id":"a","text":"b"}',
        b"\n",
        b"\r\n",
        b'"',
        b",",
        b"\xff",
        b"{",
        b"[",
        b"id,text",
        b" ",
        b"\0",
        b"x" * 70,
    ]
    while True:
        yield b"".join(rng.choices(pieces, k=rng.randint(1, 12)))


@pytest.mark.usefixtures("short_lines")
@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_a_file_with_any_content_is_read_to_its_end_or_refused_and_continues_from_any_position(
    ending: str, tmp_path: Path
) -> None:
    path = tmp_path / f"docs.{ending}"
    first = b'{"id":"a","text":"b"}\n' if ending == "jsonl" else b"id,text\n1,x\n"
    rng = random.Random(7)
    for _, content in zip(range(150), random_bytes(rng), strict=False):
        path.write_bytes(first + content)
        source = opened(path)
        read = list(source.read())
        at = rng.randrange(len(read))
        assert list(source.read(read[at].position)) == read[at + 1 :]
