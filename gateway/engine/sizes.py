"""A transformer's configuration and sizes, as transformers reads them: it knows what each architecture calls them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.engine.flash_layout import as_xlm_roberta, is_flash_layout
from gateway.engine.json_files import Json, read_object
from gateway.errors import LoadError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig  # slow to import


@dataclass(frozen=True, slots=True)
class Sizes:
    """What follows from them is how long a text may be, and how much memory a model takes."""

    width: int
    num_layers: int
    num_heads: int
    intermediate_width: int
    num_positions: int

    @classmethod
    def read(cls, folder: Path) -> Sizes:
        """Read the sizes of the checkpoint in ``folder``.

        Raises:
            LoadError: the configuration makes no sense.
        """
        try:
            config = load_config(folder)
            sizes = cls(
                width=int(config.hidden_size),
                num_layers=int(config.num_hidden_layers),
                num_heads=int(config.num_attention_heads),
                intermediate_width=int(getattr(config, "intermediate_size", None) or config.hidden_dim),
                num_positions=int(config.max_position_embeddings),
            )
        except LoadError:
            raise
        except Exception as error:  # transformers' validation raises errors of many classes
            raise LoadError(f"{folder}/config.json: not a configuration that can be used: {error}") from error
        if min(astuple(sizes)) < 1:
            raise LoadError(f"{folder}/config.json: every size must be positive, got {sizes}")
        return sizes


def read_config(folder: Path) -> dict[str, Json]:
    """Return what ``config.json`` holds, in transformers' words.

    Raises:
        LoadError: it cannot be read, or is of a layout whose model is not supported.
    """
    config = read_object(folder / "config.json")
    return as_xlm_roberta(config, folder) if is_flash_layout(config) else config


def load_config(folder: Path) -> PreTrainedConfig:
    """Return transformers' configuration of the checkpoint in ``folder``.

    Raises:
        LoadError: as :func:`read_config`.
        Exception: whatever transformers raises for one that makes no sense.
    """
    from transformers import AutoConfig, XLMRobertaConfig  # slow to import

    config: Mapping[str, Json] = read_object(folder / "config.json")
    if is_flash_layout(config):
        flash: PreTrainedConfig = XLMRobertaConfig.from_dict(as_xlm_roberta(config, folder))
        return flash
    own: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
    return own
