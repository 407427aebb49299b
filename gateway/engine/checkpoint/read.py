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
from gateway.engine.checkpoint.colbert import Colbert
from gateway.engine.checkpoint.description import Description
from gateway.engine.checkpoint.files import ADAPTER_WEIGHTS, require_model, tokenizer_files, weights_files
from gateway.engine.checkpoint.headers import read_shapes
from gateway.engine.checkpoint.identity import settings as settings_of
from gateway.engine.checkpoint.jina_tasks import read_jina_tasks
from gateway.engine.checkpoint.json_files import Json, is_present, read_object
from gateway.engine.checkpoint.layouts import Layout, layout_of
from gateway.engine.checkpoint.modules import Pooling
from gateway.engine.checkpoint.pair_template import PairTemplate, has_chat_template
from gateway.engine.checkpoint.prompts import Prompts
from gateway.engine.checkpoint.ranking import read_ranking, read_sentence_config
from gateway.engine.checkpoint.sizes import Attention, Sizes, read_config
from gateway.engine.checkpoint.sources import file_sha256
from gateway.engine.checkpoint.splade import Splade, require_masked_lm
from gateway.engine.checkpoint.static import StaticRule, StaticTable, find_static_table
from gateway.engine.checkpoint.text_template import TextTemplate
from gateway.engine.compiled_cache import CompiledCache
from gateway.errors import LoadError
from gateway.types import Output

_SPARSE_HEAD = "sparse_linear.pt"
_MULTIVECTOR_HEAD = "colbert_linear.pt"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint's own description.

    Attributes:
        transformer: folder of the transformer and its tokenizer: as a rule ``folder`` itself.
        width: dimensions of a dense vector, 0 without that output; for a classifier, its number of labels.
        hidden_width: dimensions of a token's state.
        vocab_size: number of rows of the word table; every token id is smaller.
        max_tokens: longest text, special tokens included: the length at which sentence-transformers cuts.
        max_query_tokens: longest query, where queries and documents are treated differently; else ``max_tokens``.
        position_limit: longest text that the architecture can take at all.
        dense_layers: folders of the linear layers after the pooling, in order.
        prompts: instruction of each task, as named by the checkpoint.
        default_prompt: name of the prompt for texts without a task, if the checkpoint names one.
        adapters: folder of each task's adapter; tasks may share one.
        sparse_head: weights of the layer that gives each token its weight, if there is one.
        multivector_head: weights of the layer that gives each token its vector, if there is one.
        classifier: the head that scores or classifies, if the model has one.
        pair_template: the texts around the query and the text of a pair, if the model reads them as one text.
        layout: the publisher's layout of the files; ``None`` for transformers' layout.
        has_own_code: whether the model's class is trusted code of the checkpoint rather than transformers'.
        has_pooling_module: whether sentence-transformers' files define how a text's vector is made.
        is_named: whether ``config.json`` names the class of the model.
        weights: files that hold the transformer's weights.
        fingerprint: hex sha256 over all weights files, the tokenizer, the pooling and lower-casing, the scaling of the
            adapters, the activations of the dense layers, the settings of the classifier, the dimensions that vectors
            are cut to, and the rules of static embeddings.
        static: the rules for texts, if the checkpoint is a table of token vectors without a transformer.
        splade: how its sparse vectors are made, if the model is a sparse encoder.
        colbert: how its token vectors are made, if the model is a multi-vector model.
        text_template: the chat template around each text, if the model embeds texts in one.
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
    max_query_tokens: int
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
    fingerprint: str = ""
    static: StaticRule | None = None
    splade: Splade | None = None
    colbert: Colbert | None = None
    text_template: TextTemplate | None = None

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The outputs that the checkpoint can give for a text."""
        if self.splade is not None:
            return (Output.SPARSE,)
        if self.colbert is not None:
            return (Output.MULTIVECTOR,)
        heads = ((Output.SPARSE, self.sparse_head), (Output.MULTIVECTOR, self.multivector_head))
        return (Output.DENSE, *(output for output, head in heads if head is not None))

    @property
    def adapter_folders(self) -> tuple[Path, ...]:
        """The folders of the adapters, without duplicates: an adapter's index in the runtime is its position here."""
        return tuple(dict.fromkeys(self.adapters.values()))

    @property
    def token_width(self) -> int:
        """Dimensions of a token's vector in the multi-vector output."""
        return self.hidden_width if self.colbert is None else self.colbert.width

    @property
    def max_weights(self) -> int:
        """The maximum number of weights of a text in the sparse output, at any length; 0 for one weight per token."""
        return 0 if self.splade is None else self.splade.max_active or self.vocab_size

    @property
    def has_sides(self) -> bool:
        """Whether queries and documents are treated differently, beyond the text before them."""
        return self.colbert is not None or (self.splade is not None and self.splade.queries is not None)

    @property
    def unattended_length(self) -> int:
        """The length to which a query is extended with tokens that no other token attends to; 0 without such tokens."""
        expansion = None if self.colbert is None else self.colbert.expansion
        return 0 if expansion is None or expansion.is_attended else expansion.length

    @property
    def default_task(self) -> str | None:
        """The task of a text without a task, if the checkpoint defines one: a ColBERT model's texts are documents."""
        if self.colbert is not None:
            return "retrieval.passage"
        return None if self.splade is None else self.splade.default_task

    @property
    def head(self) -> str:
        """Name of the rule by which token states become the output."""
        if self.colbert is not None:
            return "colbert"
        return self.pooling.value if self.splade is None else "splade"

    @property
    def all_weights(self) -> tuple[Path, ...]:
        """Every file with weights: the transformer's, the adapters', and those of the layers after it."""
        heads = (head for head in (self.sparse_head, self.multivector_head) if head is not None)
        adapters = (file for folder in self.adapter_folders for file in weights_files(folder, ADAPTER_WEIGHTS))
        further = self.dense_layers if self.classifier is None else self.classifier.folders
        layers = (file for folder in further for file in weights_files(folder))
        queries = () if self.splade is None or self.splade.table is None else (self.splade.table,)
        return (*self.weights, *adapters, *layers, *heads, *queries)


def read_checkpoint(
    folder: Path,
    *,
    trust_remote_code: bool = False,
    source: str = "",
    instruction: str | None = None,
    is_sparse: bool = False,
    compiled_folder: Path | None = None,
) -> Checkpoint:
    """Read the description of the checkpoint in ``folder``.

    Args:
        trust_remote_code: the checkpoint's own code may run instead of transformers' class.
        source: the registry's name of the checkpoint.
        instruction: the registry's instruction for a model that reranks.
        is_sparse: the registry says that the model gives only sparse vectors, which a folder without modules cannot say.
        compiled_folder: where an earlier start may have kept the sizes; ``None`` keeps none.

    Raises:
        LoadError: a file is missing or malformed, or the model is of a kind that is not served.
    """
    table = find_static_table(folder)
    if table is not None:
        return _read_static(folder, table)
    files = Description.read(folder, is_sparse=is_sparse)
    cache = CompiledCache(compiled_folder).readings
    return _read_transformer(folder, files, trust_remote_code, source, instruction, cache)


def _read_transformer(
    folder: Path,
    files: Description,
    trust_remote_code: bool,
    source: str,
    instruction: str | None,
    cache: CompiledCache,
) -> Checkpoint:
    root, modules = folder / files.transformer, files.modules
    require_model(root)
    config = read_config(root)
    model_type = require_model_type(config, folder)
    has_own_code = require_known_code(root, config, model_type, trust_remote_code=trust_remote_code)
    if files.splade is not None:
        require_masked_lm(folder, model_type)
    sides = {"is_embedder": files.has_pooling or files.is_by_token, "is_plain": modules is None}
    ranking = read_ranking(folder, root, config, files.scores, **sides, source=source, instruction=instruction)
    classifier, layout = ranking.classifier, layout_of(read_object(root / "config.json"))
    tasks = read_jina_tasks(folder, config, layout, modules)
    if classifier is None and not (tasks.is_jina and tasks.adapters):  # adapters for retrieval are an embedder's
        _require_embedder(folder, config, files, model_type, has_own_code=has_own_code)
    template = files.text_template(root, ranking)
    settings = files.settings(root, ranking, has_template=template is not None)
    prompts, truncated_width = _read_prompts(folder, files, scores=classifier is not None)
    sizes = Sizes.recall(root, None if has_own_code else read_shapes(weights_files(root)), cache)
    max_tokens, max_query_tokens = files.lengths(root, settings.max_tokens, sizes.num_positions)
    checkpoint = Checkpoint(
        folder=folder,
        transformer=root,
        model_type=model_type,
        width=files.width(folder, sizes.state_width, truncated_width, classifier),
        hidden_width=sizes.state_width,
        vocab_size=sizes.vocab_size,
        num_layers=sizes.num_layers,
        attention=sizes.attention,
        intermediate_width=sizes.intermediate_width,
        max_tokens=max_tokens,
        max_query_tokens=max_query_tokens,
        position_limit=sizes.num_positions,
        pooling=tasks.pooling or files.pooling(folder, classifier),
        is_normalized=tasks.is_jina or files.is_normalized,
        is_lower_cased=settings.is_lower_cased,
        dense_layers=tuple(folder / path for path in files.dense),
        prompts=tasks.prompts(prompts.texts),
        default_prompt=prompts.default,
        adapters=tasks.adapters,
        sparse_head=_existing(folder / _SPARSE_HEAD),
        multivector_head=_existing(folder / _MULTIVECTOR_HEAD),
        classifier=classifier,
        pair_template=ranking.template,
        layout=layout,
        has_own_code=has_own_code,
        has_pooling_module=ranking.is_pooled and modules is not None,
        is_named=architecture(config) is not None,
        weights=weights_files(root),
        splade=files.splade,
        colbert=files.colbert,
        text_template=template,
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
        max_query_tokens=table.max_tokens,
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
        static=table.rule,
    )
    return _with_fingerprint(checkpoint, truncated_width)


def _require_embedder(
    folder: Path, config: Mapping[str, Json], files: Description, model_type: str, *, has_own_code: bool
) -> None:
    """Refuse a checkpoint that does not define how its token states become the vector of a text."""
    modules = files.modules
    if files.is_by_token:
        return
    if modules is None or modules.pooling is None:
        require_embedder(folder, config, model_type, has_own_code=has_own_code)
    if modules is None:
        if heads := [name for name in (_SPARSE_HEAD, _MULTIVECTOR_HEAD) if is_present(folder / name)]:
            raise LoadError(
                f"{folder}: has BGE-M3's {' and '.join(heads)}, but no modules.json: BGE-M3 pools the first token, and "
                "without that file the mean would be taken. Copy modules.json and 1_Pooling from BAAI/bge-m3"
            )
        if has_chat_template(folder):  # without modules.json, sentence-transformers puts each text into it
            raise LoadError(
                f"{folder}: has a chat template, but no modules.json that says how a text is put into it and becomes a "
                "vector: use a revision with modules.json"
            )
        return
    if modules.pooling is None:
        raise LoadError(
            f"{folder}/modules.json: lists a Transformer and no Pooling, so token states do not become the vector of a text"
        )
    if modules.own_code:
        raise LoadError(f"{folder}/modules.json: {modules.own_code[0]} is the checkpoint's own code, which is not run")


def _read_prompts(folder: Path, files: Description, *, scores: bool) -> tuple[Prompts, int | None]:
    """Return the prompts, and the number of dimensions to which vectors are cut."""
    prompts, truncated_width = read_sentence_config(folder, scores=scores, is_by_token=files.is_by_token)
    return prompts if files.colbert is None else Prompts(files.colbert.prompts), truncated_width


def _existing(path: Path) -> Path | None:
    return path if is_present(path) else None


def _with_fingerprint(checkpoint: Checkpoint, truncated_width: int | None) -> Checkpoint:
    folder = checkpoint.folder
    parts = {
        path.relative_to(folder).as_posix(): file_sha256(path)
        for path in (*checkpoint.all_weights, *tokenizer_files(checkpoint.transformer))
    }
    parts |= settings_of(checkpoint.transformer)
    parts |= {"pooling": checkpoint.pooling.value, "lower_case": str(checkpoint.is_lower_cased)}
    if checkpoint.static is not None:
        parts["static"] = checkpoint.static.value
    if truncated_width is not None:
        parts["truncated"] = str(checkpoint.width)
    if checkpoint.classifier is not None:
        parts["classifier"] = checkpoint.classifier.settings
    if checkpoint.splade is not None:
        parts["splade"] = checkpoint.splade.settings
    if checkpoint.colbert is not None:
        parts["colbert"] = checkpoint.colbert.settings
    if checkpoint.pair_template is not None:
        parts["pair template"] = str(checkpoint.pair_template)
    if checkpoint.text_template is not None:
        parts["text template"] = checkpoint.text_template.settings
    for layer in checkpoint.dense_layers:  # settings that are not in the weights
        parts[f"activation of {layer.name}"] = str(read_object(layer / "config.json").get("activation_function"))
    for task, adapter in checkpoint.adapters.items():
        config = read_object(adapter / "adapter_config.json")
        parts[f"scaling of {task}"] = str([config.get(key) for key in ("r", "lora_alpha", "use_rslora")])
    return replace(checkpoint, fingerprint=hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest())
