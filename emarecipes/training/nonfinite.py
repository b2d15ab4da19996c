"""What to do when a loss or a gradient is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch.distributed as dist
from torch import Tensor
from torchtune import utils

from emarecipes.errors import UserError
from emarecipes.models.batch import Batch

log = utils.get_logger("INFO")

_SHOWN_ROWS = 32


def broken_loss(
    figures: Mapping[str, float], batches: Sequence[Batch], sums: Sequence[Tensor]
) -> str | None:
    """Which terms of a step's loss are not finite, and in which rows; None if the loss is finite.

    Every process must call it; `figures` are the same on all.

    Args:
        figures: The step's means.
        batches: This process's micro-batches.
        sums: Each one's sums of terms.
    """
    if math.isfinite(figures["loss"]):
        return None
    terms = [n for n, v in figures.items() if n != "loss" and not math.isfinite(v)]
    # A mean may be finite while its sum over the terms is not.
    values = ", ".join(f"{name} {figures[name]:g}" for name in terms or figures)
    rows = [
        row
        for batch, of_batch in zip(batches, sums, strict=True)
        if not of_batch.isfinite().all()
        for row in batch.rows
    ]
    found = _from_all(rows)  # None where a term on the adapter's matrices is what broke.
    return f"the loss is not finite ({values})" + (f"; rows {brief(found)}" if found else "")


def broken_gradient(
    norm: float, norm_of: Callable[[str], float], terms: Sequence[str], rows: Sequence[int]
) -> str | None:
    """Which terms' gradients are not finite; None if the norm is finite.

    Every process must call it; `norm` is the same on all.

    Args:
        norm: Of the whole gradient.
        norm_of: Computes that of one term alone.
        terms: Their names.
        rows: The step's.
    """
    if math.isfinite(norm):
        return None
    found = [name for name in terms if not math.isfinite(norm_of(name))]
    # Of no term alone where only their sum overflows.
    return f"the gradient of {', '.join(found) or 'the sum'} is not finite; rows {brief(rows)}"


class SkippedSteps:
    """Counts steps that are left out because a number was not finite.

    Args:
        allowed: `skip_nonfinite`: how many a run may leave out in all.
        already: How many it had left out when it was resumed.
    """

    def __init__(self, allowed: int, already: int = 0) -> None:
        self.count = already
        self._allowed = allowed

    def skip(self, step: int, reason: str) -> None:
        """Leave out this step.

        Raises:
            UserError: As many as allowed have been left out before.
        """
        if self.count >= self._allowed:
            budget = f" ({self._allowed} step(s) were skipped before)" if self._allowed else ""
            raise UserError(
                f"step {step}: {reason}. Lower the learning rate, look at these rows, or allow "
                f"skip_nonfinite{budget}"
            )
        self.count += 1
        log.warning(f"Step {step} skipped ({self.count} of {self._allowed} allowed): {reason}")


def _from_all(rows: list[int]) -> list[int]:
    if not dist.is_initialized():
        return rows
    of_all: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_all, rows)
    return sorted(row for of_one in of_all for row in of_one)


def brief(rows: Sequence[int]) -> str:
    """The first few rows, for a message."""
    shown = ", ".join(map(str, rows[:_SHOWN_ROWS]))
    return shown + (", ..." if len(rows) > _SHOWN_ROWS else "")
