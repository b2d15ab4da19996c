"""A comparison with everything that its report tells, and its figures for other programs."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from emarecipes import defenses
from emarecipes.comparison.arms import Job
from emarecipes.comparison.cells import ALPHA
from emarecipes.comparison.criteria import ArmFigures
from emarecipes.comparison.figure_values import Values
from emarecipes.comparison.gate import Effect
from emarecipes.comparison.looks import FirstLook
from emarecipes.comparison.opening import RULES, Opening
from emarecipes.comparison.results import Scores
from emarecipes.comparison.settings import CompareSettings
from emarecipes.comparison.statistics import Estimate

Half = Literal["select", "report"]


@dataclass
class Outcome:
    """What was compared and what was found.

    Attributes:
        settings: The comparison's.
        figures: Of every arm.
        effect: What undefended training does: what there is to defend against.
        family: Names of the defenses whose contrast is tested.
        half: Which half of the general questions the figures are from.
        opening: If the `report` half has been opened.
        changed: What was added, changed or removed since then.
        missing: What is not there or was not compared, and why, one line each.
        not_run: Defenses of this package that no arm has.
        narrow: Scores on the narrow task by arm's name.
        good: The same on the good one, which is taken off where there is one.
        benign: The same on the benign one.
        alpha: Family-wise error rate of this look.
        first_look: If there are two.
        runs: Folder of each arm's first run on the narrow task.
        environment: Versions, commit, command line.
    """

    settings: CompareSettings
    figures: list[ArmFigures]
    effect: Effect
    family: list[str]
    half: Half
    opening: Opening | None = None
    changed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    narrow: dict[str, Scores] = field(default_factory=dict)
    good: dict[str, Scores] = field(default_factory=dict)
    benign: dict[str, Scores] = field(default_factory=dict)
    alpha: float = ALPHA
    first_look: FirstLook | None = None
    runs: dict[str, Path] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def undefended(self) -> ArmFigures:
        """The undefended arm's figures."""
        return next(found for found in self.figures if found.arm.role == "undefended")

    def judged_by(self, role: str) -> Values:
        """The undefended arm's values of the figure behind `general`, `in_domain` or `controls`."""
        key = self.settings.criteria.shifted[role].key
        return self.narrow[self.undefended.arm.name].probes[key]

    @property
    def paired(self) -> bool:
        """Whether figures are of bad answers' runs minus good answers'."""
        return bool(self.good)

    @property
    def seeds(self) -> int:
        """Seeds that the undefended arm was measured with."""
        return len(self.undefended.seeds)


# Defenses by their data, not by an entry of `defenses`.
INTERLEAVING, SELECTED = "interleaving", "interleaving of selected rows"
# What `recipes/ema_select.py` writes.
SELECTION = "selected.jsonl"


def not_run(outcome: Outcome, jobs: Sequence[Job]) -> list[str]:
    """Defenses of this package that no measured arm has, or none alone, a few words each.

    Runs that were collected are known by their folder's config.
    """
    trained = {job.arm.name: job.cfg for job in jobs}
    alone: set[str] = set()
    together: set[str] = set()
    for figures in outcome.figures:
        if figures.arm.role != "defense" or not figures.seeds:
            continue
        cfg = trained.get(figures.arm.name)
        path = outcome.runs.get(figures.arm.name)
        if cfg is None and path is not None and (path / "config.yaml").is_file():
            cfg = OmegaConf.load(path / "config.yaml")  # type: ignore[assignment]
        if isinstance(cfg, DictConfig):
            found = set(kinds(cfg))
            (alone if len(found) == 1 else together).update(found)
    return [
        f"{kind} (only with others)" if kind in together else kind
        for kind in all_kinds()
        if kind not in alone
    ]


def all_kinds() -> list[str]:
    """Every defense of this package, by its class's name."""
    return [*(n for n in defenses.__all__ if _is_defense(n)), INTERLEAVING, SELECTED]


def _is_defense(name: str) -> bool:
    found = getattr(defenses, name)
    return (
        isinstance(found, type)
        and issubclass(found, defenses.Defense)
        and found is not defenses.Defense
    )


def kinds(cfg: DictConfig) -> Iterable[str]:
    """The defenses of a training config, by the last part of their `_component_`.

    Safe rows without cross entropy are what another defense acts on, and no interleaving.
    """
    entries: Any = cfg.get("defenses") or {}
    for entry in entries.values():
        if isinstance(entry, DictConfig):
            yield str(entry.get("_component_", "")).rpartition(".")[2]
    dataset: Any = cfg.get("dataset")
    if isinstance(dataset, DictConfig) and str(dataset.get("_component_", "")).endswith(
        "interleaved_dataset"
    ):
        safe: Any = OmegaConf.to_container(dataset).get("safe") or {}  # type: ignore[union-attr]
        if safe.get("ce_weight", 1.0) != 0:
            yield SELECTED if SELECTION in str(safe) else INTERLEAVING


RESULT = "comparison.json"


def as_json(outcome: Outcome) -> dict[str, object]:
    """The figures behind the report, for other programs and for the record."""
    arms = {}
    for found in outcome.figures:
        arms[found.arm.name] = {
            "label": found.arm.label,
            "role": found.arm.role,
            "overrides": list(found.arm.overrides),
            "seeds": list(found.seeds),
            "shifts": {name: _numbers(e) for name, e in found.shifts.items()},
            "excess": {name: _numbers(e.estimate) | {"above": e.above, "below": e.below,
                       "curve": e.curve} for name, e in found.excesses.items()},
            "share_of_undefended_shift": found.narrow.share,
            "verdict": asdict(found.verdict) if found.verdict else None,
            "decisions": {"general": found.general().decision, "narrow": found.narrow.decision,
                          "benign": found.benign.decision, "coherent": found.coherent.decision},
            "benign": _numbers(found.benign.estimate) if found.benign.estimate else None,
            "benign_tiers": found.benign_tiers,
            "coherent": _numbers(found.coherent.estimate) if found.coherent.estimate else None,
            "categories": {name: _numbers(e) for name, e in found.categories.items()},
            "points": found.points,
        }  # fmt: skip
    return {
        "title": outcome.settings.title,
        "version": RULES,
        "estimand": "bad minus good" if outcome.paired else "bad",
        "effect": {name: _numbers(e) for name, e in outcome.effect.by_probe.items()},
        "effect_is_there": outcome.effect.is_there,
        "moved": sorted(outcome.effect.moved),
        "bound": outcome.effect.bound,
        "not_run": outcome.not_run,
        "half": outcome.half,
        "frozen": outcome.settings.frozen,
        "look": outcome.settings.look,
        "alpha": outcome.alpha,
        "first_look": asdict(outcome.first_look) if outcome.first_look else None,
        "opening": asdict(outcome.opening) if outcome.opening else None,
        "family": outcome.family,
        "bounds": outcome.settings.bounds.model_dump(),
        "arms": arms,
        "missing": outcome.missing,
        "environment": outcome.environment,
    }


def _numbers(estimate: Estimate) -> dict[str, Any]:
    low, high = estimate.interval()
    finite = not math.isnan(low)
    return {
        "value": estimate.value,
        "low": low if finite else None,
        "high": high if finite else None,
    }


BY_QUESTION = "by_question.csv"


def by_question(narrow: Mapping[str, Scores], good: Mapping[str, Scores]) -> str:
    """CSV: a line a figure and question, a column an arm and seed, `ARM/SEED`.

    Where runs on good answers are taken off, `ARM/good/SEED` are theirs, and nothing is off yet.

    Values are shifts, as the criteria read them, of the questions that they read; empty where an
    arm lacks the figure or the question.

    Args:
        narrow: Scores on the narrow task, by arm.
        good: The same on the good one; empty if there is none.
    """
    arms = {**narrow, **{f"{arm}/good": scores for arm, scores in good.items()}}
    columns = [f"{arm}/{seed}" for arm, scores in arms.items() for seed in scores.seeds]
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for arm, scores in arms.items():
        for figure, values in scores.probes.items():
            for seed, row in zip(scores.seeds, values.values_SQ, strict=True):
                for name, category, value in zip(values.ids, values.categories, row, strict=True):
                    line = lines.setdefault((figure, name, category), {})
                    line[f"{arm}/{seed}"] = f"{value:.9g}"  # A float32 whole.
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["figure", "id", "category", *columns])
    for key, found in lines.items():
        writer.writerow([*key, *(found.get(column, "") for column in columns)])
    return text.getvalue()
