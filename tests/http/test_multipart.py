"""Forms with files are read piece by piece, and the pieces do not matter."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import BadInput
from gateway.http.multipart import Multipart, PartStart

TYPE = "multipart/form-data; boundary=XX"
Part = tuple[str, str | None, bytes]


def form(parts: Iterable[Part], boundary: str = "XX") -> bytes:
    body = b""
    for name, filename, content in parts:
        file = "" if filename is None else f'; filename="{filename}"'
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{file}\r\nContent-Type: text/plain\r\n\r\n'
        )
        body += head.encode() + content + b"\r\n"
    return body + f"--{boundary}--\r\n".encode()


def read(body: bytes, cuts: Iterable[int] = (), content_type: str = TYPE) -> list[Part]:
    parser = Multipart(content_type)
    parts: list[Part] = []
    places = [0, *sorted(cut for cut in cuts if cut < len(body)), len(body)]
    for begin, end in itertools.pairwise(places):
        for event in parser.feed(body[begin:end]):
            if isinstance(event, PartStart):
                parts.append((event.name, event.filename, b""))
            else:
                name, filename, content = parts[-1]
                parts[-1] = (name, filename, content + event)
    parser.finish()
    return parts


PIECES = st.lists(st.sampled_from([b"\r", b"\n", b"-", b"--", b"X", b"XX", b"\r\n--X", b"text", b"\x00"]), max_size=12)
CONTENTS = PIECES.map(b"".join).filter(lambda content: b"\r\n--XX" not in b"\r\n" + content)
PARTS = st.lists(
    st.tuples(st.sampled_from(["file", "purpose"]), st.sampled_from([None, "a.jsonl"]), CONTENTS),
    max_size=4,
)


@given(parts=PARTS, cuts=st.lists(st.integers(0, 400), max_size=30))
def test_the_parts_are_the_same_however_the_body_is_cut(parts: list[Part], cuts: list[int]) -> None:
    assert read(form(parts), cuts) == parts


@given(parts=PARTS)
def test_no_byte_more_than_a_head_is_held(parts: list[Part]) -> None:
    parser = Multipart(TYPE)
    for byte in form([*parts, ("file", "x", b"y" * 500)]):
        list(parser.feed(bytes([byte])))
        assert len(parser._held) < 200


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        (b"preamble\r\n" + form([("a", None, b"1")]) + b"epilogue" * 10, [("a", None, b"1")]),
        (form([("a", None, b"1")]).replace(b"--XX\r\n", b"--XX \t\r\n"), [("a", None, b"1")]),
        (form([("a", "ü 😀.jsonl", b"")]), [("a", "ü 😀.jsonl", b"")]),
        (form([("a", None, b"")]).replace(b'"a"', b"a; filename*=utf-8''%c3%bc"), [("a", "ü", b"")]),
        (form([("a", None, b"")]).replace(b'"a"', b"a; filename*=undefined''x"), [("a", "x", b"")]),
        (form([]), []),
    ],
    ids=["around", "blanks", "a name in Unicode", "an encoded name", "a name in no encoding", "no part"],
)
def test_forms_as_clients_may_send_them(body: bytes, parts: list[Part]) -> None:
    assert read(body) == parts


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "application/json",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        f"multipart/form-data; boundary={'x' * 71}",
    ],
)
def test_another_type_is_refused(content_type: str) -> None:
    with pytest.raises(BadInput):
        Multipart(content_type)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no form at all",
        form([("a", None, b"1")])[:-6],
        b"--XXno line break",
        b"--XX\r\n\r\nno name\r\n--XX--",
        b"--XX\r\nContent-Type: text/plain\r\n\r\nno name\r\n--XX--",
        b"--XX\r\n" + b"x" * 100_000,
        b"--XX" + b" " * 100_000,
        form([("a", None, b"")] * 21),
    ],
)
def test_a_body_that_is_not_such_a_form_is_refused(body: bytes) -> None:
    with pytest.raises(BadInput):
        read(body, range(0, len(body), 1000))
