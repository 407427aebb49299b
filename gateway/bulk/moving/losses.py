"""The limits for items that one collection of a move lacks although it had them: deleted by applications, or lost.

A move cannot tell a deletion from a loss: a collection that was truncated, created again, or restored from an older backup
lacks items too. So a step accepts few missing items by itself, and more only up to a number that the user gives.
"""

from __future__ import annotations

from typing import Final

from gateway.config.wording import count

_MANY: Final = 20


def allowed_deletions(num_items: int) -> int:
    """Return the maximum number of items that a pass deletes without the user's consent: at most half, later a tenth.

    The only item of a collection is not among them: its deletion looks like the loss of the collection.
    """
    return min(num_items // 2, max(_MANY, num_items // 10))


def allowed_missing(num_items: int) -> int:
    """Return the number of missing items up to which the last step deletes the other collection without consent."""
    return max(min(10, num_items // 10), num_items // 100)


def refuse_deletions(first: str, second: str, num_missing: int, num_items: int, command: str) -> str:
    """Describe why a pass deletes nothing, and how to continue.

    Args:
        command: the command that continues, without options.
    """
    return (
        f"{first} lacks {num_missing:,} of the {count(num_items, 'item')} that it shared with {second}, so a pass would "
        f"delete them there. Nothing was deleted, in case {first} was emptied, restored from an older backup, or deleted "
        f"and created again. If applications deleted these items, run `{command} --max-deletions {num_missing}`; `gateway "
        "move finish` ends the move and keeps both collections"
    )


def describe_missing(new: str, num_missing: int, num_items: int, move: str) -> str:
    """Describe the items that the new collection has lost, and how to continue."""
    return (
        f"{new} lacks {num_missing:,} of the {count(num_items, 'item')} that the move has copied into it. If they were lost "
        f"there, copy them again with `gateway move sync {move} --restore`. If applications deleted them, delete the old "
        f"collection with `gateway move finish {move} --delete-old --max-missing {num_missing}`"
    )
