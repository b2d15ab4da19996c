"""Runs that a comparison collects: trained and evaluated before, one folder a seed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from emarecipes.comparison.results import find_adapter
from emarecipes.config import Origin
from emarecipes.errors import UserError
from emarecipes.evaluation.figures import SUMMARY
from emarecipes.fingerprint import adapter_content


def check_collected(
    folders: Mapping[str, Sequence[str]], seeds: Sequence[int], origin: Origin
) -> None:
    """See that each collected run is one of its own, and of the seed whose place it has.

    Arms are paired by the seed, and an interval over seeds takes runs as apart. A run without a
    config.yaml beside its adapter is taken at the place's word.

    Args:
        folders: Of each arm, in the order of `seeds`.
        seeds: The comparison's.
        origin: Of the comparison's config.

    Raises:
        UserError: More or fewer folders than seeds; a run twice, or a copy of it, in whichever
            arms; an evaluation of another adapter than the run's now; a run whose own config says
            another seed.
    """
    places: dict[str, str] = {}
    for name, runs in folders.items():
        key = f"arms.{name}.collect"
        if len(runs) != len(seeds):
            raise UserError(
                f"{origin.at(key)}: {len(runs)} run folders for {len(seeds)} seeds; one a seed, in "
                "their order"
            )
        for run, seed in zip(map(Path, runs), seeds, strict=True):
            place = f"{key}, seed {seed}"
            known = _evaluated(run)
            other = places.setdefault(_mark(run, known), place)
            if other != place:
                raise UserError(
                    f"{origin.at(key)}: {run}: has the adapter of {other} too; every seed of every "
                    "arm needs a run of its own"
                )
            _check_unchanged(run, known, f"{origin.at(key)}: {run}")
            own = _own_seed(run, known)
            if own is not None and own != seed:
                raise UserError(
                    f"{origin.at(key)}: {run}: is of seed {own} (by its config.yaml) in the "
                    f"place of seed {seed}; one folder a seed, in the order of seeds"
                )


def _check_unchanged(run: Path, known: Mapping[str, Any], where: str) -> None:
    """See that scores are of the adapter as it is now, where it is still there."""
    adapter = _adapter(run, known)
    there = any(adapter.glob("adapter_*"))
    if there and "fingerprint" in known and known["fingerprint"] != adapter_content(adapter):
        raise UserError(
            f"{where}: its evaluation is of another adapter than {adapter} is now, as after a run "
            "was trained anew; evaluate it again"
        )


def adapter_mark(run: Path) -> str:
    """Of a collected run's adapter, as its evaluation has it; else the folder's name."""
    return _mark(run, _evaluated(run))


def _mark(run: Path, known: Mapping[str, Any]) -> str:
    # That an evaluation cannot be read is told where its scores are.
    return str(known.get("fingerprint", run.resolve()))


def _adapter(run: Path, known: Mapping[str, Any]) -> Path:
    """The evaluated adapter's folder; where it was moved with its run, there."""
    named = Path(str(known.get("folder", run / "adapter")))
    return named if named.is_dir() else run / named.name


def _evaluated(run: Path) -> dict[str, Any]:
    """What a run folder's evaluation says of its adapter; empty where there is none."""
    try:
        summary = json.loads((run / SUMMARY).read_text(encoding="utf-8"))
        return dict(summary["adapters"][find_adapter(run)])
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return {}


def _own_seed(run: Path, known: Mapping[str, Any]) -> int | None:
    """The seed in the config of the training; None where none is told."""
    named = Path(str(known.get("folder", run / "adapter")))
    for folder in (named.parent, run):
        try:
            config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if isinstance(config, dict) and isinstance(config.get("seed"), int):
            return int(config["seed"])
    return None
