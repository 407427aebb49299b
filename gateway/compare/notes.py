"""Notes on a comparison, which a reader must know before relying on its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gateway.cache.files import CacheFolder
from gateway.compare.arms import PlannedArm
from gateway.compare.conclusions import Conclusions
from gateway.compare.dataset import Dataset
from gateway.compare.fusion import CANDIDATES
from gateway.compare.ranking import Ranked
from gateway.compare.results import JUDGED
from gateway.compare.statistics import MIN_QUERIES
from gateway.compare.unjudged import TO_JUDGE, lists_only_relevant
from gateway.routing.spaces import is_same_space
from gateway.types import Output


def judgment_notes(dataset: Dataset, found: Conclusions) -> list[str]:
    """Return notes on the number of queries, and on documents without a judgment."""
    if not dataset.judgments:
        return []
    notes = []
    if len(dataset.queries) < MIN_QUERIES:
        notes.append(
            f"{len(dataset.queries)} queries are too few to distinguish models; at least {MIN_QUERIES} are needed."
        )
    if lists_only_relevant(dataset.judgments):
        notes.append(
            "Only relevant documents are listed, so unjudged documents look like irrelevant ones. If the "
            "judgments come from the results of one of these models, they favor it."
        )
    elif found.unlike:
        judged = {name: quality[JUDGED] for name, quality in found.qualities.items()}
        shares = ", ".join(f"{name} {sum(values.values()) / len(values):.2f}" for name, values in judged.items())
        notes.append(
            f"The arms differ in the share of judged documents among their first ten ({shares}). A verdict is given only if "
            "it is the same whether unjudged documents count as irrelevant or are left out. Judge those in "
            f"{TO_JUDGE}, and compare again with `--judged {TO_JUDGE}`."
        )
    return notes


def arm_notes(arms: Sequence[PlannedArm]) -> list[str]:
    """Return notes on the spaces and precisions of the arms."""
    notes = [_space_note(other, arm) for i, arm in enumerate(arms) for other in arms[:i] if _share_space(arm, other)]
    notes += [
        f"{arm.name.text} has an instruction for queries but not for documents, so the gateway gives them two spaces: "
        f"{arm.queries.space} and {arm.passages.space}."
        for arm in arms
        if not is_same_space(arm.queries.space, arm.passages.space)
    ]
    if any(arm.is_quantized for arm in arms):
        notes.append(
            "int8 and uint8 vectors are compared by the dot product of their integers, binary ones by their Hamming "
            "distance, without another pass over float vectors."
        )
    return notes + [note for arm in arms if (note := _mix_note(arm))]


def _mix_note(arm: PlannedArm) -> str:
    """Return a note on the ranking of an arm that uses more than dense vectors."""
    name, outputs = arm.name.text, arm.mix.outputs
    has_first_stage = any(output in arm.card.outputs for output in (Output.DENSE, Output.SPARSE))
    reranked = ""
    if Output.MULTIVECTOR in outputs and has_first_stage:
        reranked = (
            f" Token vectors were compared only with the documents that are among the first {CANDIDATES} by the model's "
            "dense or sparse vectors: this is reranking, and finds no other documents."
        )
    if len(outputs) == 1:
        return f"{name}:{reranked}" if reranked else ""
    if arm.mix.weights:
        parts = ", ".join(f"{output} {weight:g}" for output, weight in zip(outputs, arm.mix.weights, strict=True))
        how = f"by the weighted mean of its similarities ({parts}) over the first {CANDIDATES} by each"
    else:
        how = f"by reciprocal rank fusion (k = 60) of the first {CANDIDATES} by {', '.join(outputs)}"
    tuned = " Weights that were chosen by these judgments make it look better than it is." if arm.mix.weights else ""
    return f"{name} ranks {how}.{reranked}{tuned}"


def _share_space(arm: PlannedArm, other: PlannedArm) -> bool:
    has_one_precision = arm.precision is other.precision
    is_one_space = is_same_space(arm.space, other.space) and is_same_space(arm.passages.space, other.passages.space)
    return has_one_precision and is_one_space and arm.mix == other.mix


def _space_note(one: PlannedArm, other: PlannedArm) -> str:
    """Return a note on two arms in one space, which may still differ in their tasks."""
    names = f"{one.name.text} and {other.name.text}"
    if (one.queries.task, one.passages.task) == (other.queries.task, other.passages.task):
        return f"{names} are in one space: any difference comes from rounding."
    return f"{names} are in one space, and differ in the tasks that queries or documents are embedded with."


def cut_notes(ranked: Mapping[str, tuple[PlannedArm, Ranked]], num_documents: int, num_queries: int) -> list[str]:
    """Return notes on each model that read only the beginning of some documents or queries.

    Args:
        ranked: for each model, an arm and its rankings.
    """
    notes = []
    for model, (arm, found) in ranked.items():
        reads = f"{model} reads at most {arm.card.max_tokens or 0:,} tokens, so it read only the beginning of"
        if found.num_cut:
            notes.append(
                f"{reads} {found.num_cut:,} of {num_documents:,} documents. If you split long documents before you store "
                "them, split them for a comparison as well."
            )
        if found.num_cut_queries:
            notes.append(f"{reads} {found.num_cut_queries:,} of {num_queries:,} queries, as it would for your users.")
    return notes


def run_notes(cache: CacheFolder, cached: Sequence[str], *, measures_cost: bool) -> list[str]:
    """Return notes on the origin of the figures.

    Args:
        cached: see :class:`gateway.compare.cost.CostRun`.
    """
    notes = ["The search is exact: the loss from the index of a vector database is not measured."]
    if cache.num_reused:
        notes.append(f"{cache.num_reused:,} vectors were embedded by an earlier run, and read from {cache.folder}.")
    if not measures_cost:
        notes.append("The cost was not measured.")
    if cached:
        notes.append(
            f"The gateway read texts of {', '.join(cached)} from its cache of vectors, so the times of these arms are not "
            "those of their models, and are left out. To measure them, compare without --url, or turn `cache` off."
        )
    return notes
