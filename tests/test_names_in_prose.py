"""Docstrings, comments and pages name things that exist."""

from __future__ import annotations

import ast
import builtins
import importlib
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [
    path for package in ("gateway", "bench", "loadtest", "docs") for path in sorted((ROOT / package).rglob("*.py"))
]
FOLDERS = ("gateway", "bench", "loadtest", "docs", "tests", "deploy", "examples", "requirements", "golden")
QUOTED = re.compile(r"``([^`\n]+)``|:\w+:`~?([^`\n]+)`|(?<!`)`([^`\n]+)`(?!`)")
NAME = re.compile(r"[A-Za-z_][\w.]*(?:\(\))?")
FOREIGN = {
    *("Authorization", "Basic", "Host", "chunked", "traceparent", "tracestate"),
    *("Auto", "BertPooler", "ModernBertPredictionHead", "XLMRobertaClassificationHead", "clear_class_registry"),
    *("BatchHandler", "CustomFIFOQueue", "select_model"),
    *("NTKScalingRotaryEmbedding", "NewConfig", "logn_attention_clip1"),  # publishers' own code, and vLLM's
    *("JinaEmbeddingsV5Model", "VoyageQwen3BidirectionalEmbedModel"),
    *("OpenAIEmbeddings", "cl100k_base", "_process_token_weights", "encode_document", "encode_query"),
}
"""Names of HTTP, and of libraries in places that are not imported: transformers, Infinity, LangChain, FlagEmbedding."""
EXAMPLES = {"FILE.1", "FILE.2", "u", "skipped"}
PAGES = [*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in sorted((ROOT / folder).glob("**/*.md")))]
PATH = re.compile(rf"`((?:{'|'.join(FOLDERS)}|api|access|routing|backends|engine|cli|telemetry|config)/[\w./-]+)`")
EXTENSIONS = (".py", ".md", ".json", ".yaml", ".yml", ".toml", ".lock", ".txt", ".html", ".jsonl", ".tsv", ".csv")


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the docstrings and comments of a file, with their lines."""
    text = path.read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def named(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the quoted code that looks like a name."""
    for line, text in prose(path):
        for match in QUOTED.finditer(text):
            quoted = next(group for group in match.groups() if group)
            if NAME.fullmatch(quoted):
                yield line + text.count("\n", 0, match.start()), quoted.removesuffix("()")


def defined_in(tree: ast.AST) -> Iterator[str]:
    """Yield every name that a file defines or imports, its literal strings, and the keywords that it passes."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.arg(arg=name) | ast.keyword(arg=str(name)):
                yield name
            case ast.alias(name=name, asname=alias):
                yield from (alias or name).split(".")
            case ast.Attribute(attr=name) | ast.Name(id=name, ctx=ast.Store()):
                yield name
            case ast.Constant(value=str(text)) if NAME.fullmatch(text):
                yield text
                yield from text.split(".")


@cache
def known() -> frozenset[str]:
    """Return the names of the whole project, of its files and folders, and of Python."""
    trees = [ast.parse(path.read_text()) for path in FILES]
    names = {name for tree in trees for name in defined_in(tree)}
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    names |= {part for path in paths for part in (path.name, path.stem)}
    return frozenset(names | set(dir(builtins)) | set(sys.stdlib_module_names))


def exists(name: str) -> bool:
    if name.removesuffix("_total") in known() | FOREIGN | EXAMPLES or name.endswith(EXTENSIONS):
        return True
    *parents, last = name.split(".")
    if last in known() and all(parent in known() for parent in parents):
        return True
    return bool(parents) and is_of_a_library(tuple(parents), last)


@cache
def is_of_a_library(parents: tuple[str, ...], last: str) -> bool:
    try:
        return hasattr(importlib.import_module(".".join(parents)), last)
    except (ImportError, ValueError):
        return False


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_in_docstrings_and_comments_exist(path: Path) -> None:
    unknown = {f"{line}: {name}" for line, name in named(path) if not exists(name)}
    assert not unknown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path) -> None:
    paths = {match.group(1).rstrip("/.") for match in PATH.finditer(page.read_text())}
    missing = {
        name
        for name in paths
        if not any((root / f"{name}{suffix}").exists() for root in (ROOT, ROOT / "gateway") for suffix in ("", ".py"))
        and not name.startswith("bench/results")
    }
    assert not missing
