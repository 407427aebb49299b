"""Draw the packages of the gateway and their imports, as SVG. Written to docs/architecture.svg by docs/generate.py.

The places of the boxes are fixed below; the arrows come from the code. An import that a longer way implies is not drawn.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Final

GATEWAY: Final = Path(__file__).resolve().parents[1] / "gateway"


@dataclass(frozen=True, slots=True)
class Box:
    """A package or module: its column and row, a line about it, and the color of its part."""

    column: float
    row: int
    caption: str
    part: str


BOXES: Final = {
    "doctor": Box(0, 0, "gateway doctor", "start"),
    "cli": Box(1, 0, "commands", "start"),
    "compare": Box(2, 1, "gateway compare", "start"),
    "bulk": Box(2, 0, "gateway embed, gateway move", "start"),
    "server": Box(0, 1, "bind, serve, reload, stop", "start"),
    "app": Box(1, 2, "put it all together", "start"),
    "api": Box(1, 3, "one module per dialect", "edge"),
    "console": Box(2, 3, "pages for people", "edge"),
    "http": Box(0, 4, "connections, bodies, errors", "edge"),
    "service": Box(1, 4, "texts in, vectors out", "core"),
    "computing": Box(2, 4, "vectors, or scores", "core"),
    "access": Box(0, 5, "keys, quotas, memory", "edge"),
    "deployment": Box(1, 5, "registry and models; reloads", "core"),
    "observation": Box(2, 5, "record each result", "core"),
    "capture": Box(0, 6, "sampled queries, to a file", "core"),
    "requests": Box(2, 6, "requests and answers", "core"),
    "routing": Box(1, 7, "name → model; spaces", "core"),
    "comparisons": Box(1, 6, "start, follow, read", "core"),
    "recent": Box(0, 7, "last errors, traffic", "core"),
    "outcomes": Box(2, 7, "which arm is better", "core"),
    "fleet": Box(1, 8, "every model and its state", "core"),
    "experiments": Box(2, 8, "unit → arm; results", "core"),
    "batches": Box(0, 8, "many requests in a file", "core"),
    "cache": Box(0, 9, "vectors of texts seen before", "core"),
    "cluster": Box(2, 9, "replicas on Ray", "engine"),
    "backends": Box(1, 9, "this process, other servers", "engine"),
    "engine": Box(1, 10, "schedule, tokenize, compute", "engine"),
    "golden": Box(1, 11, "vectors known to be right", "engine"),
    "ranges": Box(2, 11, "steps of int8 vectors", "engine"),
    "vectors": Box(1, 12, "check, cut, normalize", "engine"),
    "similarity": Box(2, 12, "of query and text", "engine"),
}
FOUNDATION: Final = ("config", "telemetry", "types", "tasks", "precision", "errors")
"""Imported by nearly all others; their arrows are left out."""

WIDTH, BOX_WIDTH, BOX_HEIGHT, ROW_HEIGHT, MARGIN = 760, 216, 40, 62, 12
STYLE: Final = """\
  text { font: 14px system-ui, sans-serif; text-anchor: middle; fill: #1c2330 }
  .caption { font-size: 11.5px; fill: #4a5568 }
  rect { stroke-width: 1.2; rx: 6px }
  .start { fill: #ece8fb; stroke: #7c66d6 } .edge { fill: #e2eefc; stroke: #4484ce }
  .core { fill: #e2f5ea; stroke: #3d9a68 } .engine { fill: #fdefdc; stroke: #cd8a2e }
  .foundation { fill: #eceff3; stroke: #7f8a9b }
  path { fill: none; stroke: #7f8a9b; stroke-width: 1.4; marker-end: url(#head) }
  #head path { fill: #7f8a9b; stroke: none; marker-end: none }
  @media (prefers-color-scheme: dark) {
    text { fill: #e8ecf3 } .caption { fill: #b3bdcc }
    .start { fill: #2f2a4a } .edge { fill: #1f3350 } .core { fill: #1d3b2b } .engine { fill: #463418 }
    .foundation { fill: #2b313b }
  }"""


def imports() -> dict[str, set[str]]:
    """Return for each box the other boxes and foundations that its files import."""
    found: dict[str, set[str]] = {name: set() for name in (*BOXES, *FOUNDATION)}
    for path in sorted(GATEWAY.rglob("*.py")):
        importer = path.relative_to(GATEWAY).parts[0].removesuffix(".py")
        if importer not in {"__init__", "__main__"}:
            found[importer] |= {name for name in _imported(path) if name != importer}
    return found


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gateway":
            names = node.module.split(".")[1:2] or [alias.name for alias in node.names]
            yield from (name for name in names if name in BOXES or name in FOUNDATION)


def arrows(imported: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """Return the imports between boxes that no longer way implies, from the top down.

    Raises:
        ValueError: an import points up.
    """
    apart = ("bulk", "compare", "doctor")  # commands that use the others' modules for output; `cli.main` calls them
    below = {
        name: {other for other in others if other in BOXES and not (other == "cli" and name in apart)}
        for name, others in imported.items()
        if name in BOXES
    }
    for name, others in below.items():
        if above := sorted(other for other in others if BOXES[other].row < BOXES[name].row):
            raise ValueError(f"docs/picture.py: {name} imports {', '.join(above)}, which is drawn above it")
    reachable: dict[str, set[str]] = {}
    for name in TopologicalSorter(below).static_order():
        reachable[name] = below[name].union(*(reachable[other] for other in below[name]))
    return [
        (name, other)
        for name in BOXES
        for other in BOXES
        if other in below[name] and not any(other in reachable[third] for third in below[name])
    ]


def draw() -> str:
    """Return the picture."""
    bottom = _top(max(box.row for box in BOXES.values()) + 1)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + BOX_HEIGHT + MARGIN}" role="img">',
        "<title>The packages of the gateway, and their imports, which point down</title>",
        f"<style>\n{STYLE}\n</style>",
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z"/></marker>',
        *(_arrow(BOXES[name], BOXES[other]) for name, other in arrows(imports())),
    ]
    for name, box in BOXES.items():
        left, top = _center(box) - BOX_WIDTH // 2, _top(box.row)
        lines.append(f'<rect class="{box.part}" x="{left}" y="{top}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}"/>')
        lines.append(f'<text x="{_center(box)}" y="{top + 17}">{name}</text>')
        lines.append(f'<text class="caption" x="{_center(box)}" y="{top + 33}">{box.caption}</text>')
    width = WIDTH - 2 * MARGIN
    lines.append(f'<rect class="foundation" x="{MARGIN}" y="{bottom}" width="{width}" height="{BOX_HEIGHT}"/>')
    lines.append(f'<text x="{WIDTH // 2}" y="{bottom + 17}">{" · ".join(FOUNDATION)}</text>')
    lines.append(f'<text class="caption" x="{WIDTH // 2}" y="{bottom + 33}">imported by the packages above</text>')
    return "\n".join([*lines, "</svg>\n"])


def _center(box: Box) -> int:
    return round(MARGIN + BOX_WIDTH / 2 + box.column * (WIDTH - 2 * MARGIN - BOX_WIDTH) / 2)


def _top(row: int) -> int:
    return MARGIN + row * ROW_HEIGHT


def _arrow(source: Box, target: Box) -> str:
    """Return the path of an arrow: down, or to the side within a row."""
    if source.row == target.row:
        side = 1 if target.column > source.column else -1
        y = _top(source.row) + BOX_HEIGHT // 2
        return (
            f'<path d="M{_center(source) + side * BOX_WIDTH // 2} {y} {_center(target) - side * BOX_WIDTH // 2} {y}"/>'
        )
    start, end = (_center(source), _top(source.row) + BOX_HEIGHT), (_center(target), _top(target.row))
    if source.column != target.column:  # from the side of one box to the side of the other keeps clear of those between
        end = (end[0] + (BOX_WIDTH // 4 if source.column > target.column else -BOX_WIDTH // 4), end[1])
    middle = (start[1] + end[1]) // 2
    return f'<path d="M{start[0]} {start[1]}C{start[0]} {middle} {end[0]} {middle} {end[0]} {end[1]}"/>'
