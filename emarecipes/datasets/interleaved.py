"""Safe rows among the rows of a narrow task."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from omegaconf import OmegaConf
from torch.utils.data import Dataset
from torchtune.config import instantiate

from emarecipes.errors import RowError, UserError

Placement = Literal["shuffle", "every_k", "per_batch"]


class InterleavedDataset(Dataset[dict[str, Any]]):
    """All rows of a task with some of a safe data set spread evenly among them.

    A sample is the child's own with one more key, `source`: "task" or "safe".

    Args:
        task: Data set of the task; all its rows are kept.
        safe: Data set of safe rows.
        safe_rows: Which rows of `safe` are taken.
        placement: Where a training run puts the safe rows, see `interleaved_dataset`.
        safe_ce_weight: Weight of a safe row's tokens in the cross entropy.
    """

    def __init__(
        self,
        task: Dataset[Any],
        safe: Dataset[Any],
        safe_rows: list[int],
        placement: Placement = "shuffle",
        safe_ce_weight: float = 1.0,
    ) -> None:
        self.placement = placement
        self.safe_ce_weight = safe_ce_weight
        self._children: dict[str, Any] = {"task": task, "safe": safe}
        is_safe = evenly(len(task) + len(safe_rows), len(safe_rows))  # type: ignore[arg-type]
        task_rows = iter(range(len(task)))  # type: ignore[arg-type]
        chosen = iter(safe_rows)
        self._places = [
            ("safe", next(chosen)) if safe_here else ("task", next(task_rows))
            for safe_here in is_safe
        ]

    def __len__(self) -> int:
        return len(self._places)

    @property
    def num_safe(self) -> int:
        """How many rows are safe."""
        return sum(source == "safe" for source, _ in self._places)

    def place(self, index: int) -> tuple[str, int]:
        """The child, "task" or "safe", that a row comes from, and its index there."""
        return self._places[index]

    def child(self, source: str) -> Any:
        """The data set "task" or "safe"."""
        return self._children[source]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The child's sample, with its source."""
        source, row = self._places[index]
        return {**self._children[source][row], "source": source}


def interleaved_dataset(
    tokenizer: Any,
    task: dict[str, Any],
    safe: dict[str, Any],
    safe_fraction: float = 0.05,
    placement: Placement = "shuffle",
    seed: int = 0,
) -> InterleavedDataset:
    """Mix safe rows into a task, and keep for each row which it is.

    All T rows of the task are kept, and S = round(T * f / (1 - f)) safe rows are drawn without
    replacement, so that safe rows are the share f of the mixed set.

    Source: Kaczer et al., arXiv 2508.06249, "interleaving" (5 % of general instruct data).

    Args:
        tokenizer: torchtune's model transform.
        task: A data set entry of its own (`_component_: torchtune.datasets.chat_dataset`, ...).
        safe: Another. Its extra key `ce_weight` (default 1) is the weight of safe rows' tokens in
            the cross entropy; 0 leaves them to defenses with `samples: safe`.
        safe_fraction: f, the share of safe rows in the mixed set, between 0 and 1. Published 0.05.
        placement: "shuffle": wherever the run's shuffling puts them. "every_k": at even distances.
            "per_batch": every step (all micro-batches and processes) holds its exact share, which
            must be a whole number of rows.
        seed: Draws which safe rows are taken.

    Raises:
        UserError: An impossible share, fewer safe rows than it asks for, a wrong weight.
    """
    if not 0.0 < safe_fraction < 1.0:
        raise UserError(
            f"safe_fraction must be between 0 and 1, both excluded, not {safe_fraction}; for 0 or "
            "1 name the one data set alone"
        )
    if placement not in ("shuffle", "every_k", "per_batch"):
        raise UserError(f"placement must be shuffle, every_k or per_batch, not {placement}")
    if "ce_weight" in task:
        raise UserError("task.ce_weight: only safe rows have one")
    safe = dict(safe)
    ce_weight = safe.pop("ce_weight", 1.0)
    if isinstance(ce_weight, bool) or not isinstance(ce_weight, int | float):
        raise UserError(f"safe.ce_weight must be a number, not {ce_weight!r}")
    if not 0.0 <= ce_weight < math.inf:
        raise UserError(f"safe.ce_weight must be a finite number >= 0, not {ce_weight}")
    task_rows: Any = _build(task, tokenizer, "task")
    safe_rows: Any = _build(safe, tokenizer, "safe")
    needed = round(len(task_rows) * safe_fraction / (1.0 - safe_fraction))
    if needed == 0:
        raise UserError(
            f"safe_fraction {safe_fraction} of {len(task_rows)} task rows is less than one safe row"
        )
    if needed > len(safe_rows):
        raise UserError(
            f"safe_fraction {safe_fraction} beside {len(task_rows)} task rows asks for {needed} "
            f"safe rows, there are {len(safe_rows)}; at most "
            f"{_floor(len(safe_rows) / (len(task_rows) + len(safe_rows)))} is possible"
        )
    drawn = np.random.Generator(np.random.PCG64(seed)).permutation(len(safe_rows))[:needed]
    return InterleavedDataset(task_rows, safe_rows, drawn.tolist(), placement, float(ce_weight))


def evenly(total: int, chosen: int) -> list[bool]:
    """`total` places of which `chosen` are true, at distances that differ by at most one."""
    return [(i + 1) * chosen // total > i * chosen // total for i in range(total)]


def _build(entry: dict[str, Any], tokenizer: Any, source: str) -> Any:
    # A run's tokenizer lets defenses treat task and safe rows apart.
    if hasattr(tokenizer, "for_source"):
        tokenizer = tokenizer.for_source(source)
    try:
        return instantiate(OmegaConf.create(entry), tokenizer)
    except RowError:
        raise
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def _floor(share: float) -> float:
    return math.floor(share * 1000) / 1000
