"""Read static embeddings: a table with a vector for each token, and no transformer.

The vector of a text is the mean over its tokens, without special tokens. Two libraries publish such models, and they
treat texts differently:

- sentence-transformers (``StaticEmbedding`` in ``sentence_transformer/modules/static_embedding.py``): all tokens count.
- model2vec 0.10 (its ``model2vec/model.py``): a text is first cut at 512 times the median length of a token, in characters,
  then at 512 tokens. Unknown tokens are left out. sentence-transformers can read model2vec's checkpoints (potion, for
  example) too, but here their own library's rules apply.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from gateway.engine.checkpoint.files import tokenizer_files, weights_files
from gateway.engine.checkpoint.headers import Shapes, read_shapes
from gateway.engine.checkpoint.json_files import Json, read_flag, read_object
from gateway.engine.checkpoint.modules import list_modules
from gateway.engine.checkpoint.transformer import as_length
from gateway.errors import LoadError

_MODEL2VEC_LENGTH = 512
# sentence-transformers reads texts of any length. This limit bounds the cost of a text.
_LONGEST = 32_768


class StaticRule(StrEnum):
    """The library whose rules for texts apply."""

    MODEL2VEC = "model2vec"
    SENTENCE_TRANSFORMERS = "sentence-transformers"


@dataclass(frozen=True, slots=True)
class StaticTable:
    """A table of token vectors, as its files describe it.

    Attributes:
        folder: the folder of the weights and the tokenizer.
        vocab_size: number of token ids that have a vector; larger than the table if ``mapping`` lets tokens share vectors.
        max_tokens: the length at which texts are cut.
        position_limit: the largest value of ``max_tokens`` in the registry.
    """

    rule: StaticRule
    folder: Path
    width: int
    vocab_size: int
    max_tokens: int
    is_normalized: bool
    position_limit: int = _LONGEST


def find_static_table(folder: Path) -> StaticTable | None:
    """Return the description of the static embeddings in ``folder``; ``None`` if the checkpoint is something else.

    Raises:
        LoadError: a file is missing or malformed, or the weights hold more than the table.
    """
    config = read_object(folder / "config.json", optional=True)
    modules = list_modules(folder) or []
    kinds = [kind for kind, _place in modules]
    if config.get("model_type") == StaticRule.MODEL2VEC:
        path = folder / "config.json"
        is_normalized = read_flag(config, "normalize", path, default=False)
        return _table(StaticRule.MODEL2VEC, folder, _model2vec_length(config, path), is_normalized=is_normalized)
    if kinds not in (["StaticEmbedding"], ["StaticEmbedding", "Normalize"]):
        return None
    root = folder / modules[0][1]
    length = _truncation_length(root / "tokenizer.json")
    return _table(StaticRule.SENTENCE_TRANSFORMERS, root, length, is_normalized="Normalize" in kinds)


def _truncation_length(path: Path) -> int | None:
    truncation = read_object(path).get("truncation")
    if not isinstance(truncation, dict):
        return None
    if truncation.get("direction", "Right") != "Right":
        raise LoadError(f"{path}: truncation on a side other than the right is not supported: texts are cut at the end")
    return as_length(truncation.get("max_length"))


def _model2vec_length(config: Mapping[str, Json], path: Path) -> int | None:
    length = config.get("max_length", _MODEL2VEC_LENGTH)  # a release before 0.9 wrote none; `null` means no limit
    if length is not None and as_length(length) is None:
        raise LoadError(f"{path}: max_length must be a positive number of tokens or null, got {length!r}")
    return as_length(length)


def _table(rule: StaticRule, folder: Path, length: int | None, *, is_normalized: bool) -> StaticTable:
    tokenizer_files(folder)  # refuses a folder without one
    files = weights_files(folder)
    shapes = read_shapes(files)
    table = "embedding.weight" if "embedding.weight" in shapes else "embeddings"
    _require_table(table, shapes, files[0])
    vocab_size, width = shapes[table]
    if "mapping" in shapes:
        [vocab_size] = shapes["mapping"]
    if "weights" in shapes and shapes["weights"] != (vocab_size,):
        raise LoadError(
            f"{files[0]}: weights has the shape {list(shapes['weights'])}, and there are {vocab_size} tokens"
        )
    return StaticTable(rule, folder, width, vocab_size, min(length or _LONGEST, _LONGEST), is_normalized)


def _require_table(table: str, shapes: Shapes, path: Path) -> None:
    known = {"embedding.weight": 2} if table == "embedding.weight" else {"embeddings": 2, "weights": 1, "mapping": 1}
    if table not in shapes:
        raise LoadError(
            f"{path}: holds no table of static embeddings, only {', '.join(sorted(shapes)[:3]) or 'nothing'}"
        )
    if unknown := sorted(shapes.keys() - known.keys()):
        raise LoadError(
            f"{path}: holds {', '.join(unknown[:3])} in addition to the table: the checkpoint computes more"
        )
    for name, shape in shapes.items():
        if len(shape) != known[name] or 0 in shape:
            raise LoadError(
                f"{path}: {name} has the shape {list(shape)}, expected are {known[name]} dimensions, none 0"
            )
