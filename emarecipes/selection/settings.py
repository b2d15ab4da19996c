"""The plain values of a config for `recipes/ema_select.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from emarecipes.config import Origin, find_input
from emarecipes.datasets.refusals import check_refusal_words
from emarecipes.errors import UserError
from emarecipes.settings import Entry, ModelSettings, Positive, Seed, parse_settings


class SelectSettings(ModelSettings):
    """What `recipes/ema_select.py` reads at the top level of its config.

    Exactly one of `num_rows` and `fraction` must be given. `refusal_words` null: refusals are found
    by the rule of `is_refusal`. Nothing is drawn at random: `seed` is
    accepted and has no effect.
    """

    seed: Seed | None = None
    """Accepted, without effect: nothing is drawn at random."""
    candidates: Annotated[str, Field(min_length=1)]
    """Chat rows, one JSON object a line."""
    conversation_column: str = "messages"
    """The key of a row's conversation."""
    adapters: list[str]
    """Misaligned models, as adapters of this base; their NLLs are averaged."""
    num_rows: Positive | None = None
    """Rows to select; or `fraction`."""
    fraction: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Share of the rows left after the filter, in place of `num_rows`."""
    refusal_filter: bool = True
    """Leave refusals out; false: Interleaving+."""
    refusal_words: list[str] | None = None
    """Null: refusals by rule; or words or phrases among an answer's first ten words
    (docs/select.md#when-it-helps-what-it-costs)."""
    eps: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1e-6
    """gap = (NLL misaligned - NLL aligned) / (NLL aligned + eps)."""
    batch_size: Positive = 8
    """Rows scored together; changes no score by more than rounding (1e-4 in fp32)."""
    pad_to_multiple_of: Positive = 1
    """Sequence lengths are rounded up to a multiple; on a CPU every new length costs seconds."""
    provenance: Entry | None = None
    """Written into a run's `config.yaml`; not read."""


def check_select_settings(cfg: DictConfig, origin: Origin) -> DictConfig:
    """The config with defaults filled in, and its candidates and adapters found.

    Raises:
        UserError: See `parse_settings`; not one of `num_rows` and `fraction`; no refusal words, or
            one without a letter; no adapters, one twice, or a folder that is not there; no such
            file of candidates.
    """
    settings = parse_settings(cfg, origin, SelectSettings)
    if (settings.num_rows is None) == (settings.fraction is None):
        raise UserError(f"{origin.at('num_rows')}: give one of num_rows and fraction")
    check_refusal_words(settings.refusal_words, origin)
    settings.candidates = find_input(settings.candidates)
    if not Path(settings.candidates).is_file():
        raise UserError(f"{origin.at('candidates')}: no such file: {settings.candidates}")
    where = origin.at("adapters")
    settings.adapters = [find_input(adapter) for adapter in settings.adapters]
    if not settings.adapters:
        raise UserError(f"{where}: name the folder of at least one misaligned model's adapter")
    if len(set(settings.adapters)) < len(settings.adapters):
        raise UserError(f"{where}: an adapter is named twice")
    for adapter in settings.adapters:
        if not Path(adapter).is_dir():
            raise UserError(
                f"{where}: no such adapter folder: {adapter}; train it first, the config's header "
                "shows how"
            )
    return OmegaConf.create(settings.model_dump())
