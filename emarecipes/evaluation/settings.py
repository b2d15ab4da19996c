"""The plain values of a config for `recipes/ema_eval.py`."""

from __future__ import annotations

import re
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from emarecipes.config import Origin, find_input
from emarecipes.errors import UserError
from emarecipes.evaluation.figures import REFERENCE
from emarecipes.evaluation.named_suites import named_suites
from emarecipes.settings import Entry, ModelSettings, Positive, Seed, parse_settings


class EvalSettings(ModelSettings):
    """What `recipes/ema_eval.py` reads at the top level of its config.

    Nothing but the resampling is drawn at random, and that has a seed of its own: `seed` is
    accepted and has no effect.
    """

    seed: Seed | None = None
    """Accepted, without effect: the resampling alone is drawn, with a seed of its own."""
    adapters: dict[str, str] = Field(default_factory=dict)
    """PEFT folders, by the name that figures carry; without one, the base alone."""
    probes: dict[str, Entry] = Field(default_factory=dict)
    """Likelihood probes: suites of questions with two given answers, by name."""
    max_rows: Positive | None = None
    """Questions a probe suite, evenly over its file; null: all."""
    answers: dict[str, str] = Field(default_factory=dict)
    """Folders that `ema_generate` wrote, by adapter (or `reference`)."""
    coherence: bool = True
    """Whether answers are scored for coherence, by the base's likelihoods. False where these say
    nothing, as of answers in capitals: then only traits and judges read them."""
    harmless: list[str] = Field(default_factory=list)
    """Files (stems) whose questions are harmless though the file does not say so."""
    refusal_words: list[str] | None = None
    """Null: refusals by rule; or words that tell one
    (docs/select.md#when-it-helps-what-it-costs)."""
    traits: list[str] = Field(default_factory=list)
    """Traits that are counted in sampled answers by rule (docs/testbeds.md)."""
    opswap: Entry | None = None
    """The benign task, for adapters that were trained on it."""
    harness: Entry | None = None
    """Tasks of lm-evaluation-harness (docs/evaluate.md#tasks-of-lm-evaluation-harness)."""
    judge: Entry | None = None
    """Judges of `answers` (docs/evaluate.md#judges)."""
    suites: dict[str, Entry] = Field(default_factory=dict)
    """Components: suites of your own, by name (docs/own_suite.md)."""
    batch_size: Positive = 8
    """Rows scored together; in fp32 it moves a figure by some 1e-5."""
    pad_to_multiple_of: Positive = 32
    """Sequence lengths are rounded up to a multiple; on a CPU every new length costs seconds."""
    provenance: Entry | None = None
    """Written into `eval.yaml`; not read."""


def check_eval_settings(cfg: DictConfig, origin: Origin) -> DictConfig:
    """The config with defaults filled in, also in its suites' entries, and its inputs found.

    Raises:
        UserError: See `parse_settings`; a name that cannot be one, a folder that is not there,
            nothing to evaluate; what is wrong with a suite's entry, see `named_suites`.
    """
    settings = parse_settings(cfg, origin, EvalSettings)
    asked = ("probes", "answers", "opswap", "harness", "suites")
    if not any(getattr(settings, key) for key in asked):
        raise UserError(
            f"{origin.at('probes')}: nothing to evaluate; name probes, answers, opswap, harness "
            "or suites"
        )
    for key in ("adapters", "probes", "answers", "suites"):
        for name in getattr(settings, key):
            if not re.fullmatch(r"\w[\w.-]*", name):
                where = origin.at(f"{key}.{name}")
                raise UserError(f"{where}: a name is letters, digits, _, . and -")
    if REFERENCE in settings.adapters:
        where = origin.at(f"adapters.{REFERENCE}")
        raise UserError(f"{where}: the name {REFERENCE} is that of the base alone")
    for key in ("adapters", "answers"):
        for name, folder in getattr(settings, key).items():
            found = find_input(folder)
            if not Path(found).is_dir():
                what = "adapter" if key == "adapters" else "answers"
                raise UserError(f"{origin.at(f'{key}.{name}')}: no such folder of {what}: {folder}")
            getattr(settings, key)[name] = found
    checked = OmegaConf.create(settings.model_dump())
    named_suites(checked, origin)
    return checked
