"""The progress of a comparison: bars on a terminal, and elsewhere a line for each step."""

from __future__ import annotations

import io

from rich.console import Console

from gateway.compare.progress import progress_on


def shown(*, is_terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=100, color_system=None)
    with progress_on(console) as reporter:
        step = reporter.step("[jina]: documents", 300)
        step.advance(200)
        step.advance(100)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_terminal_gets_a_bar() -> None:
    assert "[jina]: documents" in shown(is_terminal=True)
    assert "300/300" in shown(is_terminal=True)


def test_a_pipe_gets_a_line() -> None:
    assert shown(is_terminal=False) == "[jina]: documents: 300\n"
