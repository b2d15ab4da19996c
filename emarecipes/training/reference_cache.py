"""The reference's states on disk: computed once, then read in later epochs and runs.

The reference is frozen and the rows are fixed, so what the defenses read of it never changes: the
last hidden states (normed) where a term on logits acts, and the layers' states where a term on
hidden states does. Where all terms read the targets' log-probabilities alone, it is these, one
number a token. `reference_cache: DIR` keeps them.

Shapes: B batch, S sequence, T selected positions, V vectors of a row, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torchtune import utils

from emarecipes.command import together
from emarecipes.defenses import Defense
from emarecipes.errors import UserError
from emarecipes.models.batch import Batch
from emarecipes.training.row_store import RowStore

log = utils.get_logger("INFO")


States = tuple[Tensor, dict[int, Tensor]]
"""At the selected positions before the output layer, (T, D), or the targets' log-probabilities,
(T, 1) (`reads_at_targets`); and by layer, (B, S, D)."""


class ReferenceCache:
    """Gives the reference's states of a batch: from disk, or computed and stored there.

    With storage as precise as training, states are those that were computed, bit for bit. They
    depend by rounding on the batch a row was in (its padding, its kernels); once stored, a row's
    stay what they were there.

    Args:
        store: The rows' states: first those before the output layer, then layer by layer.
        defenses: The run's.
        dtype: In which the model computes.
    """

    def __init__(self, store: RowStore, defenses: Iterable[Defense], dtype: torch.dtype) -> None:
        self.store = store
        self._defenses = list(defenses)
        self._layers = reference_layers(self._defenses)
        self._dtype = dtype
        self._can_write = True

    def states(self, batch: Batch, selected_BS: Tensor, forward: Callable[[], States]) -> States:
        """What `forward` returns, where a term with `needs_reference` acts; elsewhere zero (before
        the output layer) or NaN (by layer).

        Under FSDP2 a forward needs every process: if one lacks a row, all compute.

        Args:
            batch: On the model's device.
            selected_BS: The positions that `forward` returns states before the output layer of.
            forward: The reference's.

        Raises:
            UserError: A defense's positions in a row depend on other rows; raised on every process.
        """
        masks = reference_positions(self._defenses, batch)
        final_B, hidden_B = (mask_BS.sum(dim=1).tolist() for mask_BS in masks)
        wrong = self._wrong_row(batch.rows, final_B, hidden_B)
        stored = [self.store.read(row) for row in batch.rows]
        # One number for both questions, for every micro-batch asks them.
        found = -1 if wrong is not None else int(all(states is not None for states in stored))
        lowest = _lowest(found)
        if lowest < 0:
            together(lambda: _refuse(wrong))
        if lowest < 1:
            final_TD, by_layer = forward()
            parts = [final_TD[masks[0][selected_BS]].split(final_B)]
            parts += [by_layer[layer][masks[1]].split(hidden_B) for layer in self._layers]
            for b, row in enumerate(batch.rows):
                if stored[b] is None:
                    vectors_VD = torch.cat([part[b] for part in parts])
                    vectors_VD = vectors_VD.to("cpu", self.store.layout.dtype)
                    self._write(row, vectors_VD)
                    stored[b] = vectors_VD
        sizes = [(n, *[m] * len(self._layers)) for n, m in zip(final_B, hidden_B, strict=True)]
        split = [s.split(size) for s, size in zip(stored, sizes, strict=True) if s is not None]
        final, *layers = [
            torch.cat(part).to(batch.targets_BS.device, self._dtype)
            for part in zip(*split, strict=True)
        ]
        final_TD = final.new_zeros(int(selected_BS.sum()), final.shape[1])
        final_TD[masks[0][selected_BS]] = final
        by_layer = {}
        for layer, values in zip(self._layers, layers, strict=True):
            by_layer[layer] = values.new_full((*selected_BS.shape, values.shape[1]), torch.nan)
            by_layer[layer][masks[1]] = values
        return final_TD, by_layer

    def _wrong_row(self, rows: list[int], final_B: list[int], hidden_B: list[int]) -> int | None:
        """A row with another number of positions than it has alone."""
        for row, final, hidden in zip(rows, final_B, hidden_B, strict=True):
            if final + len(self._layers) * hidden != self.store.layout.vectors_N[row]:
                return row
        return None

    def _write(self, row: int, vectors_VD: Tensor) -> None:
        if not self._can_write:
            return
        try:
            self.store.write(row, vectors_VD)
        except OSError as error:
            self._can_write = False
            log.warning(f"Reference cache: nothing more is stored: {error.strerror}")


def reference_positions(defenses: Iterable[Defense], batch: Batch) -> tuple[Tensor, Tensor]:
    """Boolean (B, S), twice: where terms on logits, and on hidden states, read the reference."""
    final_BS, hidden_BS = (torch.zeros_like(batch.labelled_BS) for _ in range(2))
    for defense in defenses:
        if defense.needs_reference and defense.has("logit_term"):
            final_BS = final_BS | defense.positions(batch)
        if defense.needs_reference and defense.has("hidden_term"):
            hidden_BS = hidden_BS | defense.positions(batch)
    return final_BS, hidden_BS


def reference_layers(defenses: Iterable[Defense]) -> list[int]:
    """The layers at which some defense reads the reference."""
    reading = [d for d in defenses if d.needs_reference and d.has("hidden_term")]
    return sorted({layer for defense in reading for layer in defense.hidden_layers})


def reads_at_targets(defenses: Iterable[Defense]) -> bool:
    """Whether all that is read of the reference is its log-probability of the next token."""
    reading = [d for d in defenses if d.needs_reference]
    terms = [d for d in reading if d.has("logit_term") or d.has("hidden_term") or d.is_objective]
    return bool(terms) and all(d.reads_reference_at_targets for d in terms)


def reference_depth(defenses: Iterable[Defense], depth: int) -> int:
    """After how many of the `depth` layers the reference may end: where all is read."""
    reading = [d for d in defenses if d.needs_reference]
    if any(d.has("logit_term") for d in reading):
        return depth
    return max(reference_layers(reading), default=depth)


def _refuse(wrong_row: int | None) -> None:
    if wrong_row is not None:
        raise UserError(
            f"reference_cache: a defense acts on other positions of row {wrong_row} than when the "
            "row stands alone; leave reference_cache out with it"
        )


def _lowest(value: int) -> int:
    """The smallest of all processes' values."""
    if not dist.is_initialized():
        return value
    lowest = torch.tensor(value)
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    return int(lowest)
