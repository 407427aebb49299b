"""Read the kind of model that the files of sentence-transformers or Stanford describe: an embedder, SPLADE or ColBERT."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gateway.engine.checkpoint.classifier import Classifier
from gateway.engine.checkpoint.colbert import Colbert, read_colbert
from gateway.engine.checkpoint.json_files import read_object
from gateway.engine.checkpoint.modules import Modules, Pooling, read_dense, read_pooling
from gateway.engine.checkpoint.ranking import Ranking
from gateway.engine.checkpoint.score_modules import ScoreModules, read_all_modules
from gateway.engine.checkpoint.splade import Splade, read_splade
from gateway.engine.checkpoint.text_template import TextTemplate, read_text_template
from gateway.engine.checkpoint.transformer import TransformerSettings, as_length, read_transformer


@dataclass(frozen=True, slots=True)
class Description:
    """One of three kinds of model; empty for a plain transformers checkpoint.

    Attributes:
        scores: the description of a list of modules that ends in scores.
    """

    modules: Modules | None = None
    scores: ScoreModules | None = None
    splade: Splade | None = None
    colbert: Colbert | None = None

    @classmethod
    def read(cls, folder: Path, *, is_sparse: bool) -> Description:
        """Read the files in ``folder``.

        Args:
            is_sparse: the registry says that the model gives only sparse vectors.

        Raises:
            LoadError: the files describe a model of a form that is not supported.
        """
        if splade := read_splade(folder, is_asked_for=is_sparse):
            return cls(splade=splade)
        if colbert := read_colbert(folder):
            return cls(colbert=colbert)
        return cls(*read_all_modules(folder))

    @property
    def transformer(self) -> str:
        """Folder of the transformer, relative to the checkpoint."""
        found = self.modules or self.splade or self.colbert
        return "" if found is None else found.transformer

    @property
    def is_by_token(self) -> bool:
        """Whether the model makes no vector of a whole text."""
        return self.splade is not None or self.colbert is not None

    @property
    def has_pooling(self) -> bool:
        return self.modules is not None and self.modules.pooling is not None

    @property
    def is_normalized(self) -> bool:
        found = self.modules or self.colbert
        return found is not None and found.is_normalized

    @property
    def dense(self) -> Iterable[str]:
        """Folders of the linear layers, relative to the checkpoint."""
        if self.modules is not None:
            return self.modules.dense
        return () if self.colbert is None else self.colbert.layers

    def pooling(self, folder: Path, classifier: Classifier | None) -> Pooling:
        """Return the pooling of the states of a text's tokens into one vector, or the input of a classifier.

        Raises:
            LoadError: the checkpoint pools in a way that is not supported.
        """
        if classifier is not None:
            return classifier.pooling
        if self.modules is None or self.modules.pooling is None:
            return Pooling.MEAN
        return read_pooling(folder / self.modules.pooling)

    def width(self, folder: Path, state_width: int, truncated_width: int | None, classifier: Classifier | None) -> int:
        """Return the dimensions of a dense vector: 0 without that output; for a classifier, its number of labels.

        Args:
            truncated_width: dimensions to which vectors are cut.

        Raises:
            LoadError: a linear layer is of a form that is not supported.
        """
        if self.is_by_token:
            return 0
        if classifier is not None:
            return len(classifier.labels)
        widths = [state_width, *(read_dense(folder / layer).width for layer in self.dense)]
        return widths[-1] if truncated_width is None else min(widths[-1], truncated_width)

    def text_template(self, folder: Path, ranking: Ranking) -> TextTemplate | None:
        """Return the chat template around each text, if the model embeds and puts texts into one.

        Args:
            folder: the folder of the transformer.

        Raises:
            LoadError: the template is of a form that is not supported.
        """
        is_embedder = self.has_pooling and ranking.classifier is None
        return read_text_template(folder) if is_embedder else None

    def settings(self, folder: Path, ranking: Ranking, *, has_template: bool) -> TransformerSettings:
        """Read how sentence-transformers calls the tokenizer.

        Args:
            folder: the folder of the transformer.
            has_template: texts are put into a chat template.

        Raises:
            LoadError: the files ask for a treatment of texts that is not supported.
        """
        has = {"has_sides": self.colbert is not None, "has_template": has_template or ranking.template is not None}
        return read_transformer(folder, self._task(ranking), **has)

    def _task(self, ranking: Ranking) -> str:
        """Return transformers' name for the use of the model."""
        if self.splade is not None:
            return "fill-mask"
        if ranking.is_llm:
            return "text-generation"
        return "feature-extraction" if ranking.is_pooled else "sequence-classification"

    def lengths(self, folder: Path, named: int | None, position_limit: int) -> tuple[int, int]:
        """Return the length at which documents (or all texts) are cut, and the length at which queries are cut.

        Args:
            folder: the folder of the transformer.
            named: the length in the sentence-transformers file, if it states one.
        """
        longest = _max_tokens(folder, named, position_limit)
        if self.colbert is not None:
            document, query = self.colbert.longest_document(longest), self.colbert.longest_query(longest)
            return min(document, position_limit), min(query, position_limit)
        if self.splade is not None and self.splade.queries is not None:
            return longest, _max_tokens(self.splade.queries, None, position_limit)
        return longest, longest


def _max_tokens(folder: Path, named: int | None, position_limit: int) -> int:
    """Return the length in the sentence-transformers file, or else the tokenizer's; at most ``position_limit``."""
    tokenizer = read_object(folder / "tokenizer_config.json", optional=True)
    return min(named or as_length(tokenizer.get("model_max_length")) or position_limit, position_limit)
