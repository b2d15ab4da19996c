"""The plain values of a config for `recipes/ema_eval.py`, and the suites that it names."""

from __future__ import annotations

import re
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from emarecipes.components import build, check_components, locate, see_working_folder
from emarecipes.config import Origin, find_input
from emarecipes.errors import UserError
from emarecipes.evaluation.benign import OpSwap
from emarecipes.evaluation.coherence import Coherence
from emarecipes.evaluation.figures import REFERENCE
from emarecipes.evaluation.harness import Harness
from emarecipes.evaluation.judge_suite import Judge
from emarecipes.evaluation.probes import LikelihoodProbe
from emarecipes.evaluation.suite import KeyedSuite, Suite
from emarecipes.evaluation.traits import Traits
from emarecipes.settings import Entry, ModelSettings, Positive, Seed, parse_settings

PROBES = "probes"
# By their keys, which are their names too, but for probes: each of these has its own.
OURS: dict[str, type[KeyedSuite]] = {
    PROBES: LikelihoodProbe,
    "opswap": OpSwap,
    "harness": Harness,
    "answers": Coherence,
    "traits": Traits,
    "judge": Judge,
}
BY_KIND = {ours.kind: ours for ours in OURS.values()}


def named_suites(cfg: DictConfig, origin: Origin) -> list[Suite]:
    """The suites of an evaluation, in the order in which they are scored.

    Those that may fail for reasons of their own come last.

    Args:
        cfg: The config, its top level checked; entries of our suites get their defaults.
        origin: Where it was written.

    Raises:
        UserError: A key or value of an entry is wrong, a component is no suite, or two suites have
            one name.
    """
    ours: list[KeyedSuite] = []
    for key, kind in OURS.items():
        for suite in kind.named(cfg, origin):
            suite.name = suite.name or key
            suite.key = key if suite.name == key else f"{key}.{suite.name}"
            ours.append(suite)
    own = [_own_suite(cfg, str(name), origin) for name in cfg.suites]
    first = [suite for suite in ours if not suite.may_fail]
    suites = [*first, *own, *(suite for suite in ours if suite.may_fail)]
    _check_names(suites, origin)
    return suites


def suite_class(kind: str) -> type[Suite]:
    """The class of a suite by its `kind` in `summary.json`, see `Suite.kind`.

    Raises:
        UserError: There is none: it was written in a file that cannot be imported from here.
    """
    if kind in BY_KIND:
        return BY_KIND[kind]
    see_working_folder()
    found = locate(kind, "a suite's kind")
    if not (isinstance(found, type) and issubclass(found, Suite)):
        raise UserError(f"a suite's kind: {kind} is not a subclass of emarecipes.evaluation.Suite")
    return found


def without_answers(cfg: DictConfig) -> list[str]:
    """The keys of a config that are refused where there are no answers."""
    keys = [key for key, kind in OURS.items() if kind.needs_answers and key != "answers"]
    found = [key for key in (*keys, "patterns", "harmless") if cfg.get(key)]
    for name, entry in (cfg.get("suites") or {}).items():
        if suite_class(str(entry["_component_"])).needs_answers:
            found.append(f"suites.{name}")
    return found


def _own_suite(cfg: DictConfig, name: str, origin: Origin) -> Suite:
    key = f"suites.{name}"
    path = cfg.suites[name].get("_component_")
    if not isinstance(path, str):
        raise UserError(f"{origin.at(key)}: a suite needs a _component_, the path of its class")
    see_working_folder()
    component = locate(path, origin.at(f"{key}._component_"))
    if not (isinstance(component, type) and issubclass(component, Suite)):
        raise UserError(
            f"{origin.at(f'{key}._component_')}: {component.__name__} is not a subclass of "
            "emarecipes.evaluation.Suite"
        )
    if component.kind:
        raise UserError(
            f"{origin.at(f'{key}._component_')}: {component.__name__} has a `kind`; leave it out: "
            "it is the word of ours, and yours is found by its address"
        )
    check_components(OmegaConf.create({"suites": {name: cfg.suites[name]}}), origin)
    suite = build(cfg, key, origin)
    suite.name, suite.key = name, key
    return suite  # type: ignore[no-any-return]


def _check_names(suites: list[Suite], origin: Origin) -> None:
    """No two suites report under one name, and none under one that ours may take."""
    known: dict[str, str] = {}
    for suite in suites:
        if suite.key == suite.name:
            continue
        where = origin.at(suite.key)
        # `answers` alone is free for a probe: only `answers_<stem>` is taken.
        taken = any(suite.name.startswith(f"{key}_") for key in OURS if key != PROBES)
        if taken or suite.name in _WHOLE:
            raise UserError(f"{where}: the name is that of another suite; choose another")
        if other := known.get(suite.name):
            raise UserError(f"{where}: the name is also that of {other}; choose another")
        known[suite.name] = suite.key


# Ours that report under their key itself.
_WHOLE = ("opswap",)


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
    patterns: dict[str, str] = Field(default_factory=dict)
    """Traits of your own, by name: a regular expression each, searched in sampled answers
    (docs/evaluate.md#traits)."""
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
