"""Parameters of headers: read as clients write them, and never more than a parameter that cannot be read."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.http.parameters import read_parameter


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("text/plain; charset=utf-8", "utf-8"),
        ('text/plain; CHARSET="utf-8"; a=b', "utf-8"),
        ("text/plain; charset*=utf-8''%e2%82%ac", "€"),
        ("text/plain; charset*=ISO-8859-1'en'%A3", "£"),
        ("text/plain; charset*0=a; charset*1=b", "ab"),
        ("text/plain; charset", ""),
        ("text/plain", None),
        ('text/plain; name="charset=x"', None),
        ("", None),
    ],
)
def test_a_parameter_is_read_as_clients_write_it(header: str, expected: str | None) -> None:
    assert read_parameter(header, "charset") == expected


@pytest.mark.parametrize("numbers", ["charset*=utf-8''a; charset*0=b", "charset*0*=%ff%; charset*="])
def test_pieces_that_are_numbered_wrongly_are_no_parameter(numbers: str) -> None:
    assert read_parameter(f"text/plain; {numbers}", "charset") is None


@pytest.mark.parametrize(
    "charset", ["undefined", "idna", "punycode", "unicode_escape", "utf-7", "zlib", "nonsense", "", "a\0b"]
)
def test_other_charsets_are_read_as_utf_8(charset: str) -> None:
    assert read_parameter(f"form-data; filename*={charset}''%c3%bc", "filename") == "ü"


def test_only_the_beginning_of_a_long_header_is_read() -> None:
    assert read_parameter("text/plain; charset=x" + "; a=b" * 20_000, "charset") == "x"
    assert read_parameter("text/plain" + "; a=b" * 20_000 + "; charset=x", "charset") is None


@given(
    st.lists(
        st.sampled_from([*string.punctuation, "charset", "utf-8", "%", "*0*", "*0", "*", "''", " ", "\t", "é", "\0"]),
        max_size=30,
    ).map("".join)
)
def test_nothing_that_a_client_writes_raises(text: str) -> None:
    value = read_parameter(f"text/plain; charset{text}", "charset")

    assert value is None or value.encode() is not None
