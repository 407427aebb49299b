"""Numbers and times as text for people, with thousands separators and a true minus sign."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime

from gateway.config.wording import count

MINUS = "\N{MINUS SIGN}"
DASH = "\N{EN DASH}"
_GIB = 1024**3
_MIB = 1024**2


def number(value: float | None, digits: int = 0) -> str:
    """Return a number with this many digits after the point; a dash for ``None``."""
    return DASH if value is None else f"{value:,.{digits}f}".replace("-", MINUS)


def signed(value: float, digits: int = 3) -> str:
    """Return a difference with its sign, unless it rounds to zero."""
    text = number(value, digits)
    is_zero = not any(character in "123456789" for character in text)
    return text.removeprefix(MINUS) if is_zero else f"+{text}" if value > 0 else text


def milliseconds(seconds: float | None) -> str:
    """Return a time with about three digits: 4.2 ms, 212 ms, 12.4 s."""
    if seconds is None:
        return DASH
    if seconds >= 10:
        return f"{seconds:,.1f} s"
    ms = 1000 * seconds
    return f"{ms:,.0f} ms" if ms >= 100 else f"{ms:.1f} ms"


def size(num_bytes: float | None) -> str:
    """Return a size in the unit that fits: 1.5 GiB, 87 MiB, 384 bytes."""
    if num_bytes is None:
        return DASH
    if num_bytes >= _GIB:
        return f"{num_bytes / _GIB:,.1f} GiB"
    if num_bytes >= _MIB:
        return f"{num_bytes / _MIB:,.0f} MiB"
    return f"{num_bytes / 1024:,.0f} KiB" if num_bytes >= 10_000 else count(int(num_bytes), "byte")


def rate(per_s: float) -> str:
    """Return a rate with about three digits: 0.02, 14.2, 1,204."""
    return number(per_s, 0 if per_s >= 100 else 1 if per_s >= 1 or per_s == 0 else 2)


def percent(share: float | None, digits: int = 0) -> str:
    """Return a share as a percentage."""
    return DASH if share is None else f"{number(100 * share, digits)} %"


def p_value(p: float) -> str:
    """Return p with its relation: ``p = 0.020``."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def moment(value: str | datetime) -> str:
    """Return a time in UTC; a script in the browser converts it to the reader's time zone."""
    return f"{read_time(value):%d %b %H:%M} UTC"


def read_time(value: str | datetime) -> datetime:
    """Return an ISO 8601 time in UTC."""
    time = value if isinstance(value, datetime) else datetime.fromisoformat(value)
    return time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)


def iso(value: str | datetime) -> str:
    """Return a time for the attribute of a `time` element."""
    return read_time(value).isoformat()


def bare_space(space: str | None) -> str:
    """Return the hash of a space, which alone decides whether vectors are comparable."""
    return DASH if space is None else space.rpartition("@")[2]


def sentence(text: str) -> str:
    """Return a message as a sentence."""
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "?", "!")) else f"{text}."


FILTERS: Mapping[str, Callable[..., object]] = {
    "number": number,
    "signed": signed,
    "milliseconds": milliseconds,
    "size": size,
    "rate": rate,
    "percent": percent,
    "p_value": p_value,
    "moment": moment,
    "iso": iso,
    "bare_space": bare_space,
    "count": count,
    "sentence": sentence,
}
"""The filters by their names in templates."""
