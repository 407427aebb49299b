"""A transformer's configuration and sizes, as transformers reads them: it knows each architecture's names for them."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.engine.checkpoint.headers import Shapes
from gateway.engine.checkpoint.json_files import Json, read_object
from gateway.engine.checkpoint.layouts import Layout, layout_of, translated
from gateway.engine.compiled_cache import CompiledCache
from gateway.errors import LoadError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig  # slow to import

# RoBERTa and related models start positions after the padding id; MPNet and Jina v3 always skip two.
OFFSET_BY_PADDING = frozenset({"roberta", "xlm-roberta", "camembert"})
_UNUSED_POSITIONS = {"mpnet": 2, "jina_embeddings_v3": 2}

# T5's positions are relative, without a table. Its files name the length; this constant limits the registry's setting.
_RELATIVE_POSITIONS = 32_768

_LAYER_TYPES = {"full_attention", "sliding_attention", "conv"}
_NUM_LAYERS = ("num_hidden_layers", "n_layers", "n_layer")
# A layer of T5 is a "block", and its "layers" are the parts of one. Of a complete T5 model, only the encoder counts.
_LAYER = re.compile(r"(?:^|\.)(?:block|layers?)\.(\d+)\.")
_OTHER_PARTS = ("decoder.",)
WORDS = re.compile(r"(?:^|\.)(?:word_embeddings|tok_embeddings|embed_tokens|shared)\.weight")
_POSITIONS = re.compile(r"(?:^|\.)position_embeddings\.weight")
_SEGMENTS = re.compile(r"(?:^|\.)token_type_embeddings\.weight")
# The last layer of a feed-forward, by its names in all supported architectures.
_FEED_FORWARD = re.compile(
    r"(?:^|\.)(?:layers?\.0\.(?:output\.dense|ffn\.lin2|mlp\.(?:Wo|fc2|down_proj)|feed_forward\.w2)"
    r"|albert_layers\.0\.ffn_output|encoder\.block\.0\.layer\.1\.DenseReluDense\.wo)\.weight"
)


@dataclass(frozen=True, slots=True)
class Attention:
    """The sizes of a layer's attention.

    Attributes:
        num_heads: number of heads of the queries.
        width: total width of the queries of all heads; not always the width of the layer.
        has_windows: whether some layers attend only to nearby tokens.
    """

    num_heads: int
    width: int
    has_windows: bool = False

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Attention:
        """Read the sizes.

        Raises:
            ValueError: a layer has a type that does not exist, or a window without a size.
        """
        num_heads = int(config.num_attention_heads)
        head_width = getattr(config, "head_dim", None) or int(config.hidden_size) // max(1, num_heads)
        layer_types = getattr(config, "layer_types", None)
        window = getattr(config, "sliding_window", None)
        has_windows = bool(window)
        if layer_types is not None:
            has_windows = "sliding_attention" in layer_types
            if unknown := set(layer_types) - _LAYER_TYPES:
                raise ValueError(f"layer_types names {min(unknown)}, which {config.model_type} does not have")
            if has_windows and not window:
                raise ValueError("layer_types names sliding_attention, but no sliding_window is set, or none is used")
        return cls(num_heads, num_heads * int(head_width), has_windows)


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes that determine the maximum length of a text, and the memory of a model.

    Attributes:
        state_width: dimensions of a token's state: ``width``, unless a layer follows the last one of the transformer.
        num_positions: number of positions for a text's tokens: the size in the table or the configuration, minus the
            positions that the architecture skips.
    """

    width: int
    state_width: int
    num_layers: int
    attention: Attention
    intermediate_width: int
    num_positions: int
    vocab_size: int

    @classmethod
    def recall(cls, folder: Path, shapes: Shapes | None, cache: CompiledCache) -> Sizes:
        """Return the sizes that an earlier start has read with :meth:`read`, which lists the rest, or read them."""
        if shapes is None or layout_of(read_object(folder / "config.json")) is not None:
            return cls.read(folder, shapes)
        return cache.reading(
            folder,
            {"sizes": sorted(shapes.items())},
            read=lambda: cls.read(folder, shapes),
            parse=cls._parse,
            text=lambda sizes: json.dumps(asdict(sizes)),
        )

    @classmethod
    def _parse(cls, text: str) -> Sizes:
        values = json.loads(text)
        return cls(**{**values, "attention": Attention(**values["attention"])})

    @classmethod
    def read(cls, folder: Path, shapes: Shapes | None = None) -> Sizes:
        """Read the sizes of the checkpoint in ``folder``.

        Args:
            shapes: shapes of the weights, which must match the sizes; ``None`` if the checkpoint's own code runs.

        Raises:
            LoadError: the configuration makes no sense, or does not match the weights.
        """
        where = folder / "config.json"
        if shapes is not None:
            given = read_object(where)
            # Check this first: a configuration of a million layers takes transformers minutes.
            for name in ("num_layers",) if given.get("model_type") == "t5" else _NUM_LAYERS:
                _require_layers(name, given.get(name), shapes, where)
        try:
            config = load_config(folder)
            sizes = cls._from_config(config, is_projected=layout_of(read_object(where)) is Layout.VOYAGE)
        except LoadError:
            raise
        except Exception as error:  # transformers' validation raises errors of many classes
            raise LoadError(f"{where}: not a configuration that can be used: {error}") from error
        if (
            min(sizes.width, sizes.num_layers, sizes.attention.num_heads, sizes.intermediate_width, sizes.num_positions)
            < 1
        ):
            raise LoadError(f"{where}: every size must be positive, got {sizes}")
        if shapes is not None:
            _require_layers("num_hidden_layers", sizes.num_layers, shapes, where)
            _require_tables(config, sizes, shapes, where)
        return sizes

    @classmethod
    def _from_config(cls, config: PreTrainedConfig, *, is_projected: bool) -> Sizes:
        unused = _UNUSED_POSITIONS.get(config.model_type, 0)
        if config.model_type in OFFSET_BY_PADDING:
            unused = int(config.pad_token_id) + 1
        return cls(
            width=int(config.hidden_size),
            state_width=int((config.num_labels if is_projected else None) or config.hidden_size),
            num_layers=int(config.num_hidden_layers),
            attention=Attention.of(config),
            intermediate_width=_intermediate_width(config),
            num_positions=_RELATIVE_POSITIONS
            if config.model_type == "t5"
            else int(config.max_position_embeddings) - unused,
            vocab_size=int(config.vocab_size),
        )


def _intermediate_width(config: PreTrainedConfig) -> int:
    match config.model_type:
        case "distilbert":
            return int(config.hidden_dim)
        case "t5":
            return int(config.d_ff)
        case "lfm2" if config.block_auto_adjust_ff_dim:  # as in transformers/models/lfm2/modeling_lfm2.py
            width, multiple = int(2 * config.intermediate_size / 3), config.block_multiple_of
            if config.block_ffn_dim_multiplier is not None:
                width = multiple * -(-int(config.block_ffn_dim_multiplier * width) // multiple)
            return width
    return int(config.intermediate_size)


def _require_layers(name: str, given: object, shapes: Shapes, where: Path) -> None:
    found = {
        int(match[1]) for tensor in shapes if not tensor.startswith(_OTHER_PARTS) and (match := _LAYER.search(tensor))
    }
    if found and isinstance(given, int) and given >= 1 and given != len(found):
        raise LoadError(f"{where}: {name} is {given}, but the weights hold {len(found)} layers")


def _require_tables(config: PreTrainedConfig, sizes: Sizes, shapes: Shapes, where: Path) -> None:
    """Compare the sizes with the shapes of the tensors; transformers checks the other sizes."""
    columns = ("embedding_size", int(config.embedding_size)) if hasattr(config, "embedding_size") else None
    width = ("hidden_size", sizes.width)
    positions = int(getattr(config, "max_position_embeddings", 0))
    expected = {
        WORDS: (("vocab_size", sizes.vocab_size), columns or width),
        _POSITIONS: (("max_position_embeddings", positions), columns or width),
        _SEGMENTS: (("type_vocab_size", int(getattr(config, "type_vocab_size", 0))), columns or width),
        _FEED_FORWARD: (width, ("intermediate_size", sizes.intermediate_width)),
    }
    for tensor, shape in shapes.items():
        for pattern, dimensions in expected.items():
            if not pattern.search(tensor) or len(shape) != len(dimensions):
                continue
            for (name, size), actual in zip(dimensions, shape, strict=True):
                if size != actual:
                    raise LoadError(
                        f"{where}: {name} is {size}, but the weights do not belong to this configuration: {tensor} has "
                        f"the shape {list(shape)}"
                    )


def read_config(folder: Path) -> dict[str, Json]:
    """Return the content of ``config.json``, in transformers' words.

    Raises:
        LoadError: the file cannot be read, or its layout's model is not supported.
    """
    return translated(read_object(folder / "config.json"), folder)


def load_config(folder: Path) -> PreTrainedConfig:
    """Return transformers' configuration of the checkpoint in ``folder``.

    Raises:
        LoadError: as :func:`read_config`.
        Exception: of any class, raised by transformers for a configuration that makes no sense.
    """
    from transformers import CONFIG_MAPPING, AutoConfig  # slow to import

    config = read_object(folder / "config.json")
    own: PreTrainedConfig
    if layout_of(config) is None:
        own = AutoConfig.from_pretrained(folder, local_files_only=True)
    else:
        words = translated(config, folder)
        own = CONFIG_MAPPING[str(words["model_type"])].from_dict(words)
    # These record how the trainer ran the model. Vectors do not depend on them, and the required package may not be
    # installed.
    own._attn_implementation = None
    own.chunk_size_feed_forward = 0
    own.return_dict = True
    return own
