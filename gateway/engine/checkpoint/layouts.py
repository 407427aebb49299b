"""Layouts of publishers with their own code, recognized by `config.json` and translated to transformers' terms.

The gateway serves such a checkpoint without its code, with transformers' class of the same mathematics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path

from gateway.engine.checkpoint.flash_layout import as_xlm_roberta, is_flash_layout
from gateway.engine.checkpoint.gte_layout import as_gte, is_gte_layout
from gateway.engine.checkpoint.jina_v5_layout import as_jina_v5_base, is_jina_v5_layout
from gateway.engine.checkpoint.json_files import Json
from gateway.engine.checkpoint.nomic_layout import (
    as_nomic_bert,
    as_nomic_mixture,
    is_nomic_layout,
    is_nomic_mixture,
)
from gateway.engine.checkpoint.voyage_layout import as_two_way_qwen3, is_voyage_layout


class Layout(StrEnum):
    """A publisher's layout."""

    FLASH = "flash"
    """XLM-RoBERTa with Jina's names: :mod:`gateway.engine.checkpoint.flash_layout`."""
    NOMIC_MIXTURE = "nomic mixture"
    """Nomic's names, with a mixture of experts: :mod:`gateway.engine.model.nomic_moe`."""
    NOMIC = "nomic"
    """Nomic's names for the sizes: :mod:`gateway.engine.checkpoint.nomic_layout`. The code runs if it is trusted."""
    GTE = "gte"
    """GTE as ``model_type: new``: :mod:`gateway.engine.checkpoint.gte_layout`."""
    VOYAGE = "voyage"
    """Bidirectional Qwen3 with a projection: :mod:`gateway.engine.checkpoint.voyage_layout`."""

    JINA_V5 = "jina v5"
    """Qwen3 or EuroBERT with an adapter for each task: :mod:`gateway.engine.checkpoint.jina_v5_layout`."""


_LAYOUTS: Mapping[
    Layout,
    tuple[Callable[[Mapping[str, Json]], bool], Callable[[Mapping[str, Json], Path], dict[str, Json]]],
] = {
    Layout.FLASH: (is_flash_layout, as_xlm_roberta),
    Layout.NOMIC_MIXTURE: (is_nomic_mixture, as_nomic_mixture),
    Layout.NOMIC: (is_nomic_layout, as_nomic_bert),
    Layout.GTE: (is_gte_layout, as_gte),
    Layout.VOYAGE: (is_voyage_layout, as_two_way_qwen3),
    Layout.JINA_V5: (is_jina_v5_layout, as_jina_v5_base),
}


def layout_of(config: Mapping[str, Json]) -> Layout | None:
    """Return the layout of a ``config.json``; ``None`` if it is in transformers' words."""
    return next((layout for layout, (fits, _translate) in _LAYOUTS.items() if fits(config)), None)


def translated(config: Mapping[str, Json], folder: Path) -> dict[str, Json]:
    """Return the content of a ``config.json`` in transformers' words.

    Raises:
        LoadError: the layout's model is not supported.
    """
    layout = layout_of(config)
    if layout is None:
        return dict(config)
    words = _LAYOUTS[layout][1](config, folder)
    if layout is not Layout.NOMIC:
        classes = words.pop("auto_map", None)
        if isinstance(classes, dict) and "AutoTokenizer" in classes:  # refused later, because it may change texts
            words["auto_map"] = {"AutoTokenizer": classes["AutoTokenizer"]}
    return words
