"""The report on a job for people and for programs, with its cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from gateway.bulk.job import Outcome
from gateway.bulk.progress import duration
from gateway.bulk.rows import Json, SpaceNote
from gateway.cli.console import say
from gateway.config.wording import count


@dataclass(frozen=True, slots=True)
class Report:
    """The result of a command.

    Attributes:
        price_per_hour: the machine's price in any currency, if the user gave it.
        stale: the maximum number of rows of forgotten jobs that are still in the sink.
    """

    source: str
    sink: str
    note: SpaceNote
    manifest: Path
    errors: Path
    outcome: Outcome
    price_per_hour: float | None = None
    stale: int = 0

    @property
    def cost(self) -> float | None:
        """The price of the time that this process took, without loading the model."""
        return None if self.price_per_hour is None else self.price_per_hour * self.outcome.seconds / 3600

    def as_json(self) -> dict[str, Json]:
        """Return all figures for programs; ``this_run`` has the figures of this process."""
        outcome = self.outcome
        seconds = outcome.seconds
        run: dict[str, Json] = {
            **asdict(outcome.done),
            "seconds": round(seconds, 3),
            "rows_per_s": _per(outcome.done.rows, seconds),
            "tokens_per_s": _per(outcome.done.tokens, seconds),
        }
        if self.cost is not None:
            run |= {
                "cost": self.cost,
                "cost_per_million_rows": _per(1e6 * self.cost, outcome.done.rows),
                "cost_per_million_tokens": _per(1e6 * self.cost, outcome.done.tokens),
            }
        return {
            "is_finished": outcome.is_finished,
            "source": self.source,
            "sink": self.sink,
            **asdict(self.note),
            **asdict(outcome.total),
            "stale_rows": self.stale,
            "this_run": run,
            "manifest": str(self.manifest),
            "errors": str(self.errors) if outcome.total.skipped else None,
        }

    def print(self, console: Console) -> None:
        """Print the figures for people."""
        outcome, total = self.outcome, self.outcome.total
        if outcome.is_finished:
            say(console, f"{count(total.rows, 'row')} of {self.note.space} in {self.sink}.", "bold")
        else:
            written = count(total.rows, "row")
            say(console, f"Interrupted after {written}; the same command continues from there.", "bold")
        if self.stale:
            are = "is" if self.stale == 1 else "are"
            say(
                console,
                f"Up to {count(self.stale, 'row')} of the job that --restart forgot {are} still there, because this job did "
                "not write the same ids, and searches find them: delete them in the store, or embed into a new collection. "
                "There are fewer if another program has added rows since.",
            )
        if total.skipped:
            were = count(total.skipped, "row was", "rows were")
            say(console, f"{were} skipped; {self.errors} lists them with reasons.")
        if total.truncated:
            were = count(total.truncated, "text was", "texts were")
            say(console, f"{were} longer than the model's limit, and cut (--truncate refuse stops or skips instead).")
        done = outcome.done
        if not done.items:
            say(console, "Nothing was left to do." if outcome.is_finished else "This run embedded nothing.")
            return
        if not done.rows:
            say(console, "This run embedded nothing: it found only rows to skip.")
            return
        rates = f"{_rate(done.rows, outcome.seconds)} rows/s, {_rate(done.tokens, outcome.seconds)} tokens/s"
        earlier = f" of {total.rows:,}" if total.rows > done.rows else ""
        rows = count(done.rows, "row")
        say(console, f"This run: {rows}{earlier}, {done.tokens:,} tokens, {duration(outcome.seconds)}: {rates}.")
        if self.cost is not None and done.rows and done.tokens:
            say(
                console,
                f"Cost at {self.price_per_hour:g} per hour: {_price(self.cost)}; that is "
                f"{_price(1e6 * self.cost / done.rows)} per million rows and "
                f"{_price(1e6 * self.cost / done.tokens)} per million tokens. The time to load the model is not included.",
            )


def _per(number: float, divisor: float) -> float | None:
    return number / divisor if divisor else None


def _rate(number: int, seconds: float) -> str:
    rate = number / max(seconds, 1e-9)
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _price(value: float) -> str:
    return f"{value:,.2f}" if value >= 0.01 or not value else f"{value:.2g}"
