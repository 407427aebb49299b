"""Read a checkpoint's description: sizes, pooling, normalization, prompts, length, adapters, further heads.

The layout is sentence-transformers': ``modules.json`` lists the modules, ``sentence_bert_config.json`` the length,
``1_Pooling/config.json`` the pooling, ``config_sentence_transformers.json`` the prompts. A folder without
``modules.json`` is a plain transformers checkpoint. If its class is a model without a head,
sentence-transformers' own default applies: mean pooling and no normalization. (Its other default, the last token of a
``…ForCausalLM``, is for models that are refused here: an LLM reranker, which ``ranking`` recognizes, looks the same.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gateway.engine.checkpoint.classes import require_embedder, require_known_code, require_model_type
from gateway.engine.checkpoint.classifier import Classifier, architecture
from gateway.engine.checkpoint.files import ADAPTER_WEIGHTS, require_model, tokenizer_files, weights_files
from gateway.engine.checkpoint.headers import read_shapes
from gateway.engine.checkpoint.jina_tasks import read_jina_tasks
from gateway.engine.checkpoint.json_files import Json, read_object
from gateway.engine.checkpoint.layouts import Layout, layout_of
from gateway.engine.checkpoint.modules import (
    Modules,
    Pooling,
    as_length,
    read_dense,
    read_pooling,
    read_transformer,
)
from gateway.engine.checkpoint.pair_template import PairTemplate
from gateway.engine.checkpoint.ranking import read_ranking, read_sentence_config
from gateway.engine.checkpoint.score_modules import read_all_modules
from gateway.engine.checkpoint.sizes import Attention, Sizes, read_config
from gateway.engine.checkpoint.sources import file_sha256
from gateway.engine.checkpoint.static import StaticRule, StaticTable, find_static_table
from gateway.errors import LoadError
from gateway.types import Output

_SPARSE_HEAD = "sparse_linear.pt"
_MULTIVECTOR_HEAD = "colbert_linear.pt"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint's own description.

    Attributes:
        transformer: folder of the transformer and its tokenizer: as a rule ``folder`` itself.
        width: dimensions of a dense vector; where there is a classifier, the number of its labels.
        hidden_width: dimensions of a token's state.
        vocab_size: rows of the table of words; every token id is below it.
        max_tokens: longest text, special tokens included: what sentence-transformers cuts at.
        position_limit: longest text that the architecture can take at all.
        dense_layers: folders of the linear layers behind the pooling, in order.
        prompts: instruction of each task, as named by the checkpoint.
        default_prompt: name of the prompt for texts without a task, if the checkpoint names one.
        adapters: folder of each task's adapter; tasks may share one.
        sparse_head: weights of the layer that gives each token its weight, if there is one.
        multivector_head: weights of the layer that gives each token its vector, if there is one.
        classifier: the head that scores or classifies, if the model has one.
        pair_template: the texts around the query and the text of a pair, if the model reads them as one text.
        layout: a publisher's layout, in which its files are written; ``None`` for transformers'.
        has_own_code: whether the checkpoint brings, in place of transformers' class, code that is trusted.
        has_pooling_module: whether sentence-transformers' files say how a text's vector is made.
        is_named: whether ``config.json`` names the class of the model.
        weights: files that hold the transformer's weights.
        fingerprint: hex sha256 over all weights files, the tokenizer, the pooling and lower-casing, the scaling of the
            adapters, the activations of the dense layers, the settings of the classifier, the dimensions that vectors
            are cut to, and the rules of static embeddings.
        static: the rules for texts, if the checkpoint is a table of token vectors without a transformer.
    """

    folder: Path
    transformer: Path
    model_type: str
    width: int
    hidden_width: int
    vocab_size: int
    num_layers: int
    attention: Attention
    intermediate_width: int
    max_tokens: int
    position_limit: int
    pooling: Pooling
    is_normalized: bool
    is_lower_cased: bool
    dense_layers: tuple[Path, ...]
    prompts: Mapping[str, str]
    default_prompt: str | None
    adapters: Mapping[str, Path]
    sparse_head: Path | None
    multivector_head: Path | None
    classifier: Classifier | None
    pair_template: PairTemplate | None
    layout: Layout | None
    has_own_code: bool
    has_pooling_module: bool
    is_named: bool
    weights: tuple[Path, ...]
    fingerprint: str
    static: StaticRule | None = None

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The outputs that the checkpoint can give for a text."""
        heads = ((Output.SPARSE, self.sparse_head), (Output.MULTIVECTOR, self.multivector_head))
        return (Output.DENSE, *(output for output, head in heads if head is not None))

    @property
    def adapter_folders(self) -> tuple[Path, ...]:
        """The folder of each adapter, once: an adapter's index in the runtime is its place here."""
        return tuple(dict.fromkeys(self.adapters.values()))

    @property
    def all_weights(self) -> tuple[Path, ...]:
        """Every file with weights: the transformer's, the adapters', and those of the layers behind it."""
        heads = (head for head in (self.sparse_head, self.multivector_head) if head is not None)
        adapters = (file for folder in self.adapter_folders for file in weights_files(folder, ADAPTER_WEIGHTS))
        further = self.dense_layers if self.classifier is None else self.classifier.folders
        layers = (file for folder in further for file in weights_files(folder))
        return (*self.weights, *adapters, *layers, *heads)


def read_checkpoint(
    folder: Path, *, trust_remote_code: bool = False, source: str = "", instruction: str | None = None
) -> Checkpoint:
    """Read the description of the checkpoint in ``folder``.

    Args:
        trust_remote_code: the checkpoint's own code may run in place of transformers' class.
        source: the registry's name of the checkpoint.
        instruction: the registry's instruction for a model that reranks.

    Raises:
        LoadError: a file is missing or malformed, or the model is of a kind that is not served.
    """
    table = find_static_table(folder)
    if table is not None:
        return _read_static(folder, table)
    return _read_transformer(folder, trust_remote_code, source, instruction)


def _read_transformer(folder: Path, trust_remote_code: bool, source: str, instruction: str | None) -> Checkpoint:
    modules, scores = read_all_modules(folder)
    root = folder if modules is None else folder / modules.transformer
    require_model(root)
    config = read_config(root)
    model_type = require_model_type(config, folder)
    has_own_code = require_known_code(root, config, model_type, trust_remote_code=trust_remote_code)
    ranking = read_ranking(folder, root, config, scores, modules, source=source, instruction=instruction)
    classifier = ranking.classifier
    layout = layout_of(read_object(root / "config.json"))
    tasks = read_jina_tasks(folder, config, layout, modules)
    if classifier is None and not (tasks.is_jina and tasks.adapters):  # adapters for retrieval are an embedder's
        _require_embedder(folder, config, modules, model_type, has_own_code=has_own_code)
    settings = read_transformer(root, is_embedder=ranking.is_pooled, is_llm=ranking.is_llm)
    prompts, truncated_width = read_sentence_config(folder, scores=ranking.classifier is not None)
    weights = weights_files(root)
    sizes = Sizes.read(root, None if has_own_code else read_shapes(weights))
    dense_layers = tuple(folder / path for path in modules.dense) if modules is not None else ()
    sparse_head, multivector_head = (_existing(folder / name) for name in (_SPARSE_HEAD, _MULTIVECTOR_HEAD))
    checkpoint = Checkpoint(
        folder=folder,
        transformer=root,
        model_type=model_type,
        width=len(classifier.labels) if classifier else _width(sizes, dense_layers, truncated_width),
        hidden_width=sizes.state_width,
        vocab_size=sizes.vocab_size,
        num_layers=sizes.num_layers,
        attention=sizes.attention,
        intermediate_width=sizes.intermediate_width,
        max_tokens=_max_tokens(root, settings.max_tokens, sizes.num_positions),
        position_limit=sizes.num_positions,
        pooling=tasks.pooling or _pooling(folder, modules, classifier),
        is_normalized=tasks.is_jina or (modules is not None and modules.is_normalized),
        is_lower_cased=settings.is_lower_cased,
        dense_layers=dense_layers,
        prompts=tasks.prompts(prompts.texts),
        default_prompt=prompts.default,
        adapters=tasks.adapters,
        sparse_head=sparse_head,
        multivector_head=multivector_head,
        classifier=classifier,
        pair_template=ranking.template,
        layout=layout,
        has_own_code=has_own_code,
        has_pooling_module=ranking.is_pooled and modules is not None,
        is_named=architecture(config) is not None,
        weights=weights,
        fingerprint="",
    )
    return _with_fingerprint(checkpoint, truncated_width)


def _read_static(folder: Path, table: StaticTable) -> Checkpoint:
    prompts, truncated_width = read_sentence_config(folder, scores=False)
    checkpoint = Checkpoint(
        folder=folder,
        transformer=table.folder,
        model_type="static",
        width=min(table.width, truncated_width or table.width),
        hidden_width=table.width,
        vocab_size=table.vocab_size,
        num_layers=0,
        attention=Attention(0, 0),
        intermediate_width=0,
        max_tokens=table.max_tokens,
        position_limit=table.position_limit,
        pooling=Pooling.MEAN,
        is_normalized=table.is_normalized,
        is_lower_cased=False,
        dense_layers=(),
        prompts=prompts.texts,
        default_prompt=prompts.default,
        adapters={},
        sparse_head=None,
        multivector_head=None,
        classifier=None,
        pair_template=None,
        layout=None,
        has_own_code=False,
        has_pooling_module=True,
        is_named=True,
        weights=weights_files(table.folder),
        fingerprint="",
        static=table.rule,
    )
    return _with_fingerprint(checkpoint, truncated_width)


def _require_embedder(
    folder: Path, config: Mapping[str, Json], modules: Modules | None, model_type: str, *, has_own_code: bool
) -> None:
    """Refuse a checkpoint that does not say how its token states become the vector of a text."""
    if modules is None or modules.pooling is None:
        require_embedder(folder, config, model_type, has_own_code=has_own_code)
    if modules is None:
        if heads := [name for name in (_SPARSE_HEAD, _MULTIVECTOR_HEAD) if (folder / name).exists()]:
            raise LoadError(
                f"{folder}: has BGE-M3's {' and '.join(heads)}, but no modules.json: BGE-M3 pools the first token, and "
                "without that file the mean would be taken. Copy modules.json and 1_Pooling from BAAI/bge-m3"
            )
        return
    if modules.pooling is None:
        raise LoadError(f"{folder}/modules.json: lists a Transformer and no Pooling: nothing makes a vector of a text")
    if modules.own_code:
        raise LoadError(f"{folder}/modules.json: {modules.own_code[0]} is the checkpoint's own code, which is not run")


def _pooling(folder: Path, modules: Modules | None, classifier: Classifier | None) -> Pooling:
    if classifier is not None:
        return classifier.pooling
    return Pooling.MEAN if modules is None or modules.pooling is None else read_pooling(folder / modules.pooling)


def _width(sizes: Sizes, dense_layers: tuple[Path, ...], truncated_width: int | None) -> int:
    width = sizes.state_width
    for layer in dense_layers:
        width = read_dense(layer).width
    return width if truncated_width is None else min(width, truncated_width)


def _max_tokens(folder: Path, named: int | None, position_limit: int) -> int:
    """Return the length that the sentence-transformers file names, else the tokenizer's; at most the positions."""
    tokenizer = read_object(folder / "tokenizer_config.json", optional=True)
    return min(named or as_length(tokenizer.get("model_max_length")) or position_limit, position_limit)


def _existing(path: Path) -> Path | None:
    return path if path.exists() else None


def _with_fingerprint(checkpoint: Checkpoint, truncated_width: int | None) -> Checkpoint:
    folder = checkpoint.folder
    parts = {
        path.relative_to(folder).as_posix(): file_sha256(path)
        for path in (*checkpoint.all_weights, *tokenizer_files(checkpoint.transformer))
    }
    parts |= {"pooling": checkpoint.pooling.value, "lower_case": str(checkpoint.is_lower_cased)}
    if checkpoint.static is not None:
        parts["static"] = checkpoint.static.value
    if truncated_width is not None:
        parts["truncated"] = str(checkpoint.width)
    if checkpoint.classifier is not None:
        parts["classifier"] = checkpoint.classifier.settings
    if checkpoint.pair_template is not None:
        parts["pair template"] = str(checkpoint.pair_template)
    for layer in checkpoint.dense_layers:  # what the weights do not say
        parts[f"activation of {layer.name}"] = str(read_object(layer / "config.json").get("activation_function"))
    for task, adapter in checkpoint.adapters.items():
        config = read_object(adapter / "adapter_config.json")
        parts[f"scaling of {task}"] = str([config.get(key) for key in ("r", "lora_alpha", "use_rslora")])
    return replace(checkpoint, fingerprint=hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest())
