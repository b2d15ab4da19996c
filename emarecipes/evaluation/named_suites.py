"""The suites that a config names: ours by keys of their own, others as components."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from emarecipes.components import build, check_components, locate, see_working_folder
from emarecipes.config import Origin
from emarecipes.errors import UserError
from emarecipes.evaluation.benign import OpSwap
from emarecipes.evaluation.coherence import Coherence
from emarecipes.evaluation.harness import Harness
from emarecipes.evaluation.judge_suite import Judge
from emarecipes.evaluation.probes import LikelihoodProbe
from emarecipes.evaluation.suite import KeyedSuite, Suite
from emarecipes.evaluation.traits import Traits

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
    found = [key for key in (*keys, "harmless") if cfg.get(key)]
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
