"""Measure the code, and check it against the budgets of docs/style.md.

::

    python docs/measure.py                   print the figures; exit 1 where a budget is exceeded
    python docs/measure.py --request         start the gateway as well, and follow one request through it
    python docs/measure.py --project PATH    measure another checkout, such as an older commit's; checks nothing
"""

from __future__ import annotations

import argparse
import ast
import io
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

from followed_request import follow

ROOT: Final = Path(__file__).resolve().parents[1]
PACKAGES: Final = ("gateway", "bench", "loadtest", "docs")
MAX_FILE_LINES: Final = 400
MAX_FUNCTION_LINES: Final = 60
MAX_IMPORT_LINES: Final = 30
TO_DO: Final[set[str]] = set()
"""Files that exceed a budget and must still be split. The list only gets shorter."""
_NOT_CODE: Final = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
_NOT_CODE_EITHER: Final = {tokenize.ENCODING, tokenize.ENDMARKER}
# Of namedtuples, of `os`, and of the answers of OpenAI's client, which all document them.
_PUBLIC_NAMES: Final = {"_asdict", "_fields", "_make", "_replace", "_exit", "_request_id"}


@dataclass(frozen=True, slots=True)
class Function:
    """A function or method, and how long it is, docstring included."""

    name: str
    lines: int


@dataclass(frozen=True, slots=True)
class Module:
    """One Python file, measured."""

    path: str
    lines: int
    code_lines: int
    import_lines: int
    functions: tuple[Function, ...]
    num_reach_ins: int

    @property
    def package(self) -> str:
        """``gateway/api`` for all files below it, ``gateway`` for a file next to the packages."""
        parts = self.path.split("/")
        return "/".join(parts[:2]) if parts[0] == "gateway" and len(parts) > 2 else parts[0]


def measure(path: Path, project: Path) -> Module:
    """Return the figures of one file."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    return Module(
        path=path.relative_to(project).as_posix(),
        lines=text.count("\n"),
        code_lines=_code_lines(text, tree),
        import_lines=sum(
            _length(node) for node in _module_level(tree) if isinstance(node, ast.Import | ast.ImportFrom)
        ),
        functions=tuple(Function(node.name, _length(node)) for node in _functions(tree)),
        num_reach_ins=sum(_reaches_in(node) for node in ast.walk(tree)),
    )


def _length(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def _module_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """Yield the statements of a module, those under ``if TYPE_CHECKING`` included."""
    for node in tree.body:
        yield node
        if isinstance(node, ast.If):
            yield from node.body


def _code_lines(text: str, tree: ast.Module) -> int:
    """Count the lines that are neither blank nor comment nor docstring."""
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NOT_CODE | _NOT_CODE_EITHER:
            code |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            code -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(code)


def _reaches_in(node: ast.AST) -> bool:
    """Whether an expression reads a private attribute of another object."""
    if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
        return False
    is_own = isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"}
    return not is_own and node.attr not in _PUBLIC_NAMES


def over_budget(modules: Sequence[Module]) -> Iterator[str]:
    """Yield a line for each file, function and list of imports that is too long."""
    for module in modules:
        if module.lines > MAX_FILE_LINES:
            yield f"{module.path} has {module.lines} lines; at most {MAX_FILE_LINES} are allowed: split it"
        if module.import_lines > MAX_IMPORT_LINES:
            yield (
                f"{module.path} has {module.import_lines} lines of imports; at most {MAX_IMPORT_LINES} are allowed: "
                "it does more than one thing"
            )
        for function in module.functions:
            if function.lines > MAX_FUNCTION_LINES:
                yield (
                    f"{module.path}: {function.name} has {function.lines} lines; at most {MAX_FUNCTION_LINES} are "
                    "allowed: name its parts"
                )


def report(modules: Sequence[Module], tests: Sequence[Module]) -> Iterator[str]:
    """Yield the figures, a line each."""
    product = [module for module in modules if module.path.startswith("gateway/")]
    functions = [(function, module) for module in product for function in module.functions]
    longest, where = max(functions, key=lambda pair: pair[0].lines)
    largest = max(product, key=lambda module: module.lines)
    imports, code = sum(module.import_lines for module in product), sum(module.code_lines for module in product)
    yield f"gateway: {len(product)} modules, {sum(module.lines for module in product):,} lines, {code:,} of code"
    lines_of = Counter[str]()
    for module in product:
        lines_of[module.package] += module.code_lines
    yield "  " + " · ".join(
        f"{package.removeprefix('gateway/')} {count:,}" for package, count in lines_of.most_common()
    )
    yield f"  modules next to the packages: {sum(module.path.count('/') == 1 for module in product) - 1}"
    yield f"  imports: {imports:,} lines, {imports / code:.1%} of code"
    yield f"  longest file: {largest.path}, {largest.lines} lines; median {median(m.lines for m in product):.0f}"
    yield f"  longest function: {longest.name} in {where.path}, {longest.lines} lines; median " + (
        f"{median(function.lines for function, _ in functions):.0f}"
    )
    for package in PACKAGES[1:]:
        yield f"{package}: {sum(m.code_lines for m in modules if m.path.startswith(f'{package}/')):,} lines of code"
    num_tests = sum(function.name.startswith("test_") for module in tests for function in module.functions)
    yield f"tests: {num_tests:,} functions, {sum(module.code_lines for module in tests):,} lines of code"
    yield f"  private attributes that they read: {sum(module.num_reach_ins for module in tests)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the figures; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--project", type=Path, default=ROOT, help="the checkout to measure")
    parser.add_argument("--request", action="store_true", help="follow one request as well; takes some 20 s")
    options = parser.parse_args(arguments)
    project: Path = options.project.resolve()
    files = [path for package in PACKAGES for path in sorted((project / package).rglob("*.py"))]
    modules = [measure(path, project) for path in files]
    tests = [measure(path, project) for path in sorted((project / "tests").rglob("*.py"))]
    for line in report(modules, tests):
        sys.stdout.write(f"{line}\n")
    if options.request:
        met, values = follow(project)
        sys.stdout.write(f"one POST /v1/embeddings enters {len(met)} modules and makes values of {len(values)} types\n")
        sys.stdout.write(f"  {' '.join(met)}\n  {' '.join(values)}\n")
    exceeded = [line for line in over_budget(modules) if line.partition(" ")[0].rstrip(":") not in TO_DO]
    exceeded = exceeded if project == ROOT else []
    for line in exceeded:
        sys.stdout.write(f"{line}\n")
    return 1 if exceeded else 0


if __name__ == "__main__":
    sys.exit(main())
