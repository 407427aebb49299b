"""Puts a change of a function into a module that is imported already."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType

_CO_OPTIMIZED = 0x1  # all code but that of modules and classes


def patch(path: Path, before: str, after: str) -> bool:
    """Give a function of an imported module the code that it has in a changed source.

    Args:
        path: the module's file.
        before: the source that was imported.
        after: the same with a change inside of one function.

    Returns:
        Whether that is done. It can't be if no such function exists at runtime, or if it no longer uses a variable of its
        class.
    """
    changed = [
        (old, new)
        for old, new in zip(_functions(before, path), _functions(after, path), strict=True)
        if _without_lines(old) != _without_lines(new)
    ]
    if len(changed) != 1 or changed[0][0].co_freevars != changed[0][1].co_freevars:
        return False
    [(old, new)] = changed
    functions = [
        function
        for function in gc.get_objects()
        if type(function) is FunctionType and function.__code__.co_filename == str(path) and function.__code__ == old
    ]
    for function in functions:
        function.__code__ = new
    return bool(functions)


def _functions(source: str, path: Path) -> list[CodeType]:
    """Return the code of the functions of a module and of its classes, in the order of the file."""

    def walk(code: CodeType) -> Iterator[CodeType]:
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                if constant.co_flags & _CO_OPTIMIZED:
                    yield constant
                else:
                    yield from walk(constant)

    return list(walk(compile(source, str(path), "exec", dont_inherit=True)))


def _without_lines(code: CodeType) -> CodeType:
    constants = tuple(_without_lines(one) if isinstance(one, CodeType) else one for one in code.co_consts)
    return code.replace(co_firstlineno=1, co_linetable=b"", co_consts=constants)
