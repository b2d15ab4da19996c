"""Which defenses a comparison has, and which it has not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from emarecipes import defenses
from emarecipes.comparison.arms import Job
from emarecipes.comparison.outcome import Outcome

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
