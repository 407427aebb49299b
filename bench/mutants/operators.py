"""Small faults to put into a module, one at a time.

Only code that can change behavior is touched: docstrings, prose (a text with a space in it), log calls, the texts of errors,
annotations, decorators and ``__all__`` are left alone.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
_OPPOSITES = {"min": "max", "max": "min", "any": "all", "all": "any"}
_LOG_METHODS = {"debug", "info", "warning", "error", "exception"}
_LOGS = {"log", "_log", "logger", "_logger"}
_COMMUTATIVE = {"max", "min", "suppress"}
_ENCODINGS = {"utf-8", "utf-8-sig", "ascii"}  # Python takes nearly any spelling
# Tests need not notice that a number above this limit changes by one, nor that a tuned figure, which means a constant of
# a module, changes a little.
_MAX_STEPPED = 100
_MUCH = 1000


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change of a module.

    Attributes:
        module: path of the file, from the project's root.
        line: first line that changes, from 1.
        lines: first and last line of the statement (of its head, if it has a body): a test that runs none of them
            can't notice.
        operator: what kind of change it is.
        before: source lines that change, joined and stripped.
        after: the same lines with the change.
        source: the whole module with the change.
        is_in_function: whether all of the change is inside of a function, so that it can be put into an imported module.
        key: a hash of the change and of the function that it is in, or of the whole module outside of functions.
    """

    module: str
    line: int
    lines: tuple[int, int]
    operator: str
    before: str
    after: str
    source: str
    is_in_function: bool
    key: str

    def order(self, seed: int) -> str:
        """Return a random sort key that stays the same for the same change, wherever its line moves."""
        text = f"{seed}\0{self.module}\0{self.operator}\0{self.before}\0{self.after}"
        return hashlib.sha256(text.encode()).hexdigest()


def mutants_of(module: str, source: str) -> list[Mutant]:
    """Return every mutant of a module, in the order of the file."""
    collector = _Collector()
    collector.visit(ast.parse(source))
    found: dict[tuple[int, str], Mutant] = {}
    for change in collector.changes:
        mutant = _apply(module, source, change)
        if mutant.before != mutant.after:
            found.setdefault((mutant.line, mutant.source), mutant)
    return sorted(found.values(), key=lambda mutant: mutant.line)


@dataclass(frozen=True, slots=True)
class _Change:
    operator: str
    node: ast.expr | ast.stmt
    new: str
    statement: ast.stmt
    function: ast.stmt | None


def _apply(module: str, source: str, change: _Change) -> Mutant:
    lines = source.encode().splitlines(keepends=True)
    node = change.node
    first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
    head, tail = lines[first][: node.col_offset], lines[last][node.end_col_offset :]
    new = head + change.new.encode() + tail
    mutated = b"".join([*lines[:first], new, *lines[last + 1 :]]).decode()
    before = b" ".join(line.strip() for line in lines[first : last + 1]).decode()
    statement = change.statement
    body = getattr(statement, "body", None)
    end = statement.end_lineno or statement.lineno
    if isinstance(body, list) and body and not isinstance(statement, ast.Match):
        end = max(statement.lineno, min(end, body[0].lineno - 1))
    after = new.decode().strip()
    key = _key(module, lines, change, (before, after))
    places = node.lineno, (statement.lineno, end)
    return Mutant(module, *places, change.operator, before, after, mutated, change.function is not None, key)


def _key(module: str, lines: list[bytes], change: _Change, texts: tuple[str, str]) -> str:
    first, last = 1, len(lines)
    if (function := change.function) is not None:
        first, last = function.lineno, function.end_lineno or function.lineno
    around = b"".join(lines[first - 1 : last])
    text = "\0".join([module, change.operator, *texts, str(change.node.lineno - first)])
    return hashlib.sha256(text.encode() + b"\0" + around).hexdigest()[:24]


class _Collector(ast.NodeVisitor):
    """Walks a module and collects the changes."""

    def __init__(self) -> None:
        self.changes: list[_Change] = []
        self._statements: list[ast.stmt] = []
        self._functions: list[ast.stmt] = []
        self._is_error = False

    # ---------------------------------------------------------------------------------------------------- walking

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.stmt):
            self._statements.append(node)
            self._visit_statement(node)
            self._statements.pop()
        elif isinstance(node, ast.JoinedStr):
            return  # Python 3.11 gives wrong places for the nodes inside
        else:
            if isinstance(node, ast.expr):
                self._mutate_expression(node)
            super().visit(node)

    def _visit_statement(self, node: ast.stmt) -> None:
        if _is_left_alone(node):
            return
        if (bound := _tuned_product(node)) is not None:
            self._add("constant", bound, ast.BinOp(bound, ast.Mult(), ast.Constant(_MUCH)))
            return
        self._mutate_statement(node)
        super().visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._visit_function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._visit_function(node)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.visit(node.body)

    def _visit_function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self.visit(default)
        self._functions.append(node)
        for statement in node.body:
            self.visit(statement)
        self._functions.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for statement in node.body:
            self.visit(statement)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Raise(self, node: ast.Raise) -> None:
        was, self._is_error = self._is_error, True
        self.generic_visit(node)
        self._is_error = was

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in ("cast", "TypeVar", "getLogger"):
            for argument in node.args[1:]:
                self.visit(argument)
        elif isinstance(node.func, ast.Name) and node.func.id == "zip":
            for argument in node.args:  # and not `strict`, which is an assertion
                self.visit(argument)
        elif not _is_log_call(node):
            self.generic_visit(node)

    def visit_MatchValue(self, node: ast.MatchValue) -> None:
        """Leave patterns alone: they are not expressions, so they cannot be put in parentheses."""

    # --------------------------------------------------------------------------------------------------- changing

    def _add(self, operator: str, node: ast.expr | ast.stmt, new: str | ast.expr) -> None:
        if isinstance(new, ast.expr):
            text = ast.unparse(new)
            new = text if isinstance(new, ast.Constant | ast.Name | ast.Call | ast.Attribute) else f"({text})"
        function = self._functions[0] if self._functions else None
        self.changes.append(_Change(operator, node, new, self._statements[-1], function))

    def _mutate_statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Expr(value=ast.Call() | ast.Await()) | ast.Delete() | ast.Continue() | ast.Break():
                self._add("statement dropped", node, "pass")
            case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
                self._add("statement dropped", node, "pass")
            case ast.AugAssign(op=op):
                self._add("statement dropped", node, "pass")
                if (other := _ARITHMETIC.get(type(op))) is not None:
                    new = ast.AugAssign(node.target, other(), node.value)
                    self._add("arithmetic", node, ast.unparse(new))
            case ast.Raise():
                self._add("raise dropped", node, "pass")
            # An empty text is nothing, too: "no message".
            case ast.Return(value=ast.expr() as value) if not (isinstance(value, ast.Constant) and not value.value):
                self._add("return value dropped", node, "return None")
            case ast.If():
                self._add("condition", node.test, "True")
                self._add("condition", node.test, "False")
            case ast.While() if not isinstance(node.test, ast.Constant):
                self._add("condition", node.test, "False")

    def _mutate_expression(self, node: ast.expr) -> None:
        for kind, mutate in _EXPRESSIONS.items():
            if isinstance(node, kind):
                for operator, new in mutate(node):
                    if not (self._is_error and isinstance(node, ast.Constant)):
                        self._add(operator, node, self._as_constant(node, new))
        if isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            for test in (test for generator in node.generators for test in generator.ifs):
                self._add("condition", test, "True")

    def _as_constant(self, node: ast.expr, new: ast.expr) -> ast.expr:
        """Return a much larger value for a tuned number, one of a module's constant in capitals, and else ``new``."""
        match self._statements[-1], node, new:
            case (
                ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)),
                ast.Constant(value=float() | int() as value),
                ast.Constant(),
            ) if name.isupper() and not isinstance(value, bool):
                return ast.Constant(value * _MUCH or _MUCH)
        return new


def _is_left_alone(node: ast.stmt) -> bool:
    match node:
        case ast.Expr(value=ast.Constant()):  # a docstring
            return True
        case ast.Expr(value=ast.Call() as call) | ast.Expr(value=ast.Await(value=ast.Call() as call)):
            return _is_log_call(call)
        case ast.If(test=ast.Name(id="TYPE_CHECKING")) | ast.Import() | ast.ImportFrom() | ast.Assert():
            return True
        case ast.Assign(targets=[ast.Name(id="__all__" | "__slots__")]):
            return True
        case ast.Assign(value=ast.Subscript(value=ast.Name(id="Literal" | "Annotated"))):
            return True
    return False


def _tuned_product(node: ast.stmt) -> ast.BinOp | None:
    """Return the product that gives a module's constant its value, such as ``64 * 2**20``, if it has only numbers."""
    match node:
        case ast.Assign(targets=[ast.Name(id=name)], value=ast.BinOp() as value) if name.isupper():
            leaves = (
                leaf for leaf in ast.walk(value) if isinstance(leaf, ast.expr) and not isinstance(leaf, ast.BinOp)
            )
            return value if all(isinstance(leaf, ast.Constant) for leaf in leaves) else None
    return None


def _is_log_call(node: ast.Call) -> bool:
    match node.func:
        case ast.Attribute(value=ast.Name(id=name), attr=method):
            return name in _LOGS and method in _LOG_METHODS
    return False


_Changes = Iterator[tuple[str, ast.expr]]


def _comparison(node: ast.Compare) -> _Changes:
    for i, op in enumerate(node.ops):
        for other in _COMPARISONS.get(type(op), ()):
            ops = [*node.ops[:i], other(), *node.ops[i + 1 :]]
            yield "comparison", ast.Compare(node.left, ops, node.comparators)


def _boolean(node: ast.BoolOp) -> _Changes:
    other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    yield "and/or", ast.BoolOp(other, node.values)
    for i in range(len(node.values)):
        left = [*node.values[:i], *node.values[i + 1 :]]
        yield "operand dropped", left[0] if len(left) == 1 else ast.BoolOp(node.op, left)


def _unary(node: ast.UnaryOp) -> _Changes:
    if isinstance(node.op, ast.Not):
        yield "not dropped", node.operand
    elif isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
        yield "sign dropped", node.operand


def _binary(node: ast.BinOp) -> _Changes:
    is_text = any(isinstance(side, ast.JoinedStr) or _is_text(side) for side in (node.left, node.right))
    if not is_text and (other := _ARITHMETIC.get(type(node.op))) is not None:
        yield "arithmetic", ast.BinOp(node.left, other(), node.right)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)


def _constant(node: ast.Constant) -> _Changes:
    value = node.value
    if isinstance(value, bool):
        yield "constant", ast.Constant(not value)
    elif isinstance(value, int) and value > _MAX_STEPPED:
        yield "constant", ast.Constant(value * 2)
    elif isinstance(value, int):
        yield "off by one", ast.Constant(value + 1)
        if value > 1:
            yield "off by one", ast.Constant(value - 1)
    elif isinstance(value, float):
        yield "constant", ast.Constant(value * 2 or 1.0)
    elif isinstance(value, str) and " " not in value and value not in _ENCODINGS:
        yield "constant", ast.Constant(value + "~" if value else "mutant")


def _choice(node: ast.IfExp) -> _Changes:
    yield "condition", node.body
    yield "condition", node.orelse


def _call(node: ast.Call) -> _Changes:
    if len(node.args) >= 2 and not any(isinstance(argument, ast.Starred) for argument in node.args[:2]):
        first, second, *others = node.args
        is_commutative = isinstance(node.func, ast.Name) and node.func.id in _COMMUTATIVE
        if not (is_commutative or _is_log_call(node) or ast.dump(first) == ast.dump(second)):
            yield "arguments swapped", ast.Call(node.func, [second, first, *others], node.keywords)
    if isinstance(node.func, ast.Name) and node.func.id in _OPPOSITES:
        yield "opposite", ast.Call(ast.Name(_OPPOSITES[node.func.id]), node.args, node.keywords)


_EXPRESSIONS: dict[type[ast.expr], Callable[..., _Changes]] = {
    ast.Compare: _comparison,
    ast.BoolOp: _boolean,
    ast.UnaryOp: _unary,
    ast.BinOp: _binary,
    ast.Constant: _constant,
    ast.IfExp: _choice,
    ast.Call: _call,
}
