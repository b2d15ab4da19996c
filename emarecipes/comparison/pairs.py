"""Two runs of a pair, on bad answers and on good ones, differ in their data and in nothing else."""

from __future__ import annotations

import filecmp
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from emarecipes.comparison.settings import GOOD
from emarecipes.errors import UserError
from emarecipes.fingerprint import named_files

# In a data set's entry, where the rows are and how they are written down.
_OF_DATA = {
    *("_component_", "source", "data_files", "data_dir", "name", "split", "revision"),
    *("conversation_column", "conversation_style", "column_map", "column"),
}


def check_pairs(
    runs: Sequence[tuple[str, str, int, Path]],
    configs: Sequence[DictConfig],
    labels: Mapping[str, str],
    where: str,
) -> None:
    """See that a run on good answers differs from its sibling in its data, and in nothing else.

    Args:
        runs: Name of the arm, task, seed and folder.
        configs: Theirs.
        labels: Of the arms, for people, by name.
        where: The good task's place.

    Raises:
        UserError: Another key differs, also one of the data set that is none of where its rows are
            and how they are written; or the data are the same, in whichever files.
    """
    written = {
        (name, seed, task): (cfg, folder)
        for (name, task, seed, folder), cfg in zip(runs, configs, strict=True)
    }
    for name, task, seed, _ in runs:
        if task != GOOD:
            continue
        good, narrow = (_without(*written[name, seed, one]) for one in (GOOD, "narrow"))
        other = sorted(k for k in good.keys() | narrow.keys() if good.get(k) != narrow.get(k))
        kept = [key for key in other if key != "dataset"]
        kept += _other_keys(good["dataset"], narrow["dataset"], "dataset")
        under = f"{where}: under {labels[name]}"
        if kept:
            raise UserError(
                f"{under} it has another {kept[0]} than narrow; only the data may differ"
            )
        if "dataset" not in other or _is_same(good["dataset"], narrow["dataset"]):
            raise UserError(
                f"{under} its data are those of narrow; give the ones with good answers"
            )


def _without(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """The config as JSON, without the run's folder, which JSON writes alike anywhere."""
    own = json.dumps(str(folder))[1:-1]
    text = json.dumps(OmegaConf.to_container(cfg), default=repr)
    found: dict[str, Any] = json.loads(text.replace(own, ""))
    return found


def _other_keys(good: Any, narrow: Any, key: str) -> list[str]:
    if isinstance(good, dict) and isinstance(narrow, dict):
        names = sorted((good.keys() | narrow.keys()) - _OF_DATA)
        return [k for n in names for k in _other_keys(good.get(n), narrow.get(n), f"{key}.{n}")]
    if isinstance(good, list) and isinstance(narrow, list) and len(good) == len(narrow):
        pairs = zip(good, narrow, strict=True)
        return [k for i, pair in enumerate(pairs) for k in _other_keys(*pair, f"{key}[{i}]")]
    return [key] if good != narrow else []


def _is_same(good: Any, narrow: Any) -> bool:
    """Whether both read the same bytes in the same way."""
    if _without_files(good) != _without_files(narrow):
        return False
    ours, theirs = named_files(good), named_files(narrow)
    return (
        len(ours) == len(theirs) > 0
        and all(filecmp.cmp(*pair, shallow=False) for pair in zip(ours, theirs, strict=True))
    )  # fmt: skip


def _without_files(entry: Any) -> Any:
    if isinstance(entry, dict):
        return {k: _without_files(v) for k, v in entry.items() if k != "data_files"}
    return [_without_files(one) for one in entry] if isinstance(entry, list) else entry
