"""Print for people: with the width and colors of a terminal, or plain and wide.

Text is printed verbatim: brackets are not markup, ``:smile:`` is not an emoji, and numbers are not highlighted. Colored
text is a :class:`rich.text.Text` with a style.
"""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

# Where the output is not a terminal: wide enough for a line of any table.
_PIPE_WIDTH = 180


def make_console(*, is_error: bool = False) -> Console:
    """Return a console for standard output, or for standard error."""
    console = Console(stderr=is_error, markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    return console


def say(console: Console, text: str, style: str = "") -> None:
    """Print a sentence, wrapped on a terminal and otherwise on one line."""
    console.print(Text(text, style=style), soft_wrap=not console.is_terminal)


def print_error(text: str) -> None:
    """Print an error to standard error, in red on a terminal; its lines are not wrapped, so that they can be copied."""
    make_console(is_error=True).print(Text(text, style="red"), soft_wrap=True)


def make_table(*columns: str, has_header: bool = True) -> Table:
    """Return a table that wraps its columns on a narrow terminal, and never cuts them."""
    table = Table(box=box.SIMPLE_HEAD if has_header else None, show_header=has_header, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
