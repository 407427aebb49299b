"""Print for people: on a terminal with its width and colors, elsewhere plain and wide.

Text is printed as it is: a bracket is no markup, ``:smile:`` no emoji, and a number no reason for a color. What is to be
colored is a :class:`rich.text.Text` with a style.
"""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

# Where the output is no terminal: wide enough for a line of any table.
_PIPE_WIDTH = 180


def make_console(*, is_error: bool = False) -> Console:
    """Return a console for standard output, or for standard error."""
    console = Console(stderr=is_error, markup=False, emoji=False, highlight=False)
    return (
        console
        if console.is_terminal
        else Console(stderr=is_error, markup=False, emoji=False, highlight=False, width=_PIPE_WIDTH)
    )


def say(console: Console, text: str, style: str = "") -> None:
    """Print a sentence; where the output is no terminal, in one line however long it is."""
    console.print(Text(text, style=style), soft_wrap=not console.is_terminal)


def make_table(*columns: str, has_header: bool = True) -> Table:
    """Return a table whose columns are broken over lines, never cut, where the terminal is narrow."""
    table = Table(box=box.SIMPLE_HEAD if has_header else None, show_header=has_header, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
