"""A run's rows: every one tokenized and checked before any weight is loaded, and put into steps."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig, ListConfig
from torchtune.datasets import ConcatDataset

from emarecipes.components import build
from emarecipes.config import Origin
from emarecipes.datasets.defended_tokenizer import DefendedTokenizer
from emarecipes.datasets.interleaved import InterleavedDataset, Placement, evenly
from emarecipes.datasets.loading import load_dataset
from emarecipes.datasets.row_messages import CheckedTexts, CheckedTransform
from emarecipes.datasets.tokenized import Ends, count_ends, tell_losses, tell_share, tokenize
from emarecipes.defenses import Defense
from emarecipes.errors import UserError
from emarecipes.fingerprint import sha256
from emarecipes.models._torchtune import data_sets_read_with
from emarecipes.provenance import environment

POOL_STEPS = 50
"""Rows of this many steps are sorted together: enough that a step's rows are near in length, few
enough that who meets whom is drawn anew in each epoch of a large set."""


def group_by_length(
    steps_NK: NDArray[Any],
    lengths: NDArray[Any],
    generator: np.random.Generator,
    is_safe_NK: NDArray[Any],
) -> NDArray[Any]:
    """The same rows in other steps: within a pool of steps sorted by length, steps in random order.

    A step's own rows are sorted too, so that the micro-batches dealt from it hold similar rows. How
    they are dealt does not matter here: the result depends on the arguments alone.

    Args:
        steps_NK: Rows of N steps of K, in random order.
        lengths: Tokens of every row of the data set.
        generator: Draws the order of steps.
        is_safe_NK: Where safe rows are. They are sorted apart from the others, so that each step
            keeps as many of them as it drew: safe rows are of other lengths, and sorted together
            they would make steps of one source.

    Returns:
        The rows of the steps, (N, K).
    """
    grouped_NK = np.empty_like(steps_NK)
    for start in range(0, len(steps_NK), POOL_STEPS):
        pool = slice(start, start + POOL_STEPS)
        for places_PK in (is_safe_NK[pool], ~is_safe_NK[pool]):
            rows = steps_NK[pool][places_PK]
            # Stable: rows of one length stay in the order that was drawn.
            grouped_NK[pool][places_PK] = rows[np.argsort(lengths[rows], kind="stable")]
    order_NK = np.argsort(lengths[grouped_NK], axis=1, kind="stable")
    return generator.permutation(np.take_along_axis(grouped_NK, order_NK, axis=1))


class Rows:
    """The rows that a run trains on, tokenized.

    Attributes:
        dropped: How many rows had no label left (after truncation, or none at all).
        ends: How many conversations of the others do not end, see `count_ends`.
        fingerprint: SHA-256 over all tokens and labels, in order.
        longest: Tokens of the longest row.
        largest_token: The largest token id.
        sources: The sources that occur: "task", "safe".
        packed: Whether a row holds several conversations.
        safe_ce_weight: Weight of safe rows in the cross entropy; None where no row is safe.
        num_safe: How many rows are safe.

    Args:
        samples: The rows.
        dropped: See above.
        placement: Where each epoch's order puts safe rows, see `interleaved_dataset`.
        safe_ce_weight: See above.
        grouped: Whether a shuffled epoch's steps hold rows of similar length.
    """

    def __init__(
        self,
        samples: list[dict[str, Any]],
        dropped: int,
        placement: Placement = "shuffle",
        safe_ce_weight: float = 1.0,
        grouped: bool = False,
    ) -> None:
        self._samples = samples
        self._placement = placement
        self._grouped = grouped
        self._lengths = np.array([len(sample["tokens"]) for sample in samples])
        self.dropped, self.ends = dropped, Ends()
        self.longest = int(self._lengths.max())
        self.largest_token = max(int(max(sample["tokens"])) for sample in samples)
        self._is_safe = np.array([sample.get("source") == "safe" for sample in samples])
        self.num_safe = int(self._is_safe.sum())
        self.sources = {sample.get("source", "task") for sample in samples}
        self.safe_ce_weight = safe_ce_weight if self.num_safe else None
        self.packed = "seq_lens" in samples[0]
        digest = hashlib.sha256()
        for sample in samples:
            digest.update(np.asarray(sample["tokens"], dtype=np.int64).tobytes())
            digest.update(np.asarray(sample["labels"], dtype=np.int64).tobytes())
            digest.update(sample.get("source", "task").encode())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample in the form that torchtune's collate functions take."""
        return {
            key: value.tolist() if isinstance(value, np.ndarray) else value
            for key, value in self._samples[index].items()
        }

    def num_steps(self, rows_per_step: int) -> int:
        """Whole steps in an epoch.

        Raises:
            UserError: Every step is to hold its share of safe rows, and that is no whole number.
        """
        if self._placement != "per_batch":
            return len(self) // rows_per_step
        safe = self._safe_per_step(rows_per_step)
        return min(self.num_safe // safe, (len(self) - self.num_safe) // (rows_per_step - safe))

    def steps(self, rows_per_step: int, *, seed: int, epoch: int, shuffle: bool) -> list[list[int]]:
        """The rows of every step of an epoch, as a function of the seed and the epoch alone.

        What is left after the last whole step is dropped, as torchtune does.

        Args:
            rows_per_step: Batch size x accumulation steps x processes.
            seed: The run's seed.
            epoch: From 0.
            shuffle: Else rows come in the order of the data set.
        """
        steps = self.num_steps(rows_per_step)
        order: NDArray[np.int64] = np.arange(len(self))
        generator = np.random.Generator(np.random.PCG64([seed, epoch]))
        if shuffle:
            order = generator.permutation(len(self))
        if self._placement != "shuffle":
            # Both sources in their own order; only who comes where is set.
            safe, task = order[self._is_safe[order]], order[~self._is_safe[order]]
            pattern = np.array(evenly(len(self), len(safe)))
            if self._placement == "per_batch":
                share = self._safe_per_step(rows_per_step)
                pattern = np.tile(evenly(rows_per_step, share), steps)
            order = np.empty(len(pattern), dtype=np.int64)
            order[pattern], order[~pattern] = safe[: pattern.sum()], task[: (~pattern).sum()]
        by_step: NDArray[np.int64] = order[: steps * rows_per_step].reshape(steps, rows_per_step)
        if shuffle and self._grouped and steps:
            is_safe = self._is_safe[by_step]
            by_step = group_by_length(by_step, self._lengths, generator, is_safe)
        rows: list[list[int]] = by_step.tolist()
        return rows

    def covering_steps(self, rows_per_step: int, *, seed: int, shuffle: bool) -> list[list[int]]:
        """The first epoch's steps, then steps of the rows that these leave out.

        The last step is filled up by repeating its last row.
        """
        steps = self.steps(rows_per_step, seed=seed, epoch=0, shuffle=shuffle)
        rest = sorted(set(range(len(self))) - {row for step in steps for row in step})
        rest += rest[-1:] * (-len(rest) % rows_per_step)
        return steps + [
            rest[start : start + rows_per_step] for start in range(0, len(rest), rows_per_step)
        ]

    def _safe_per_step(self, rows_per_step: int) -> int:
        share = self.num_safe / len(self) * rows_per_step
        whole = round(share)
        # The set itself holds its share to within one row.
        if not 0 < whole < rows_per_step or abs(share - whole) > rows_per_step / len(self):
            raise UserError(
                f"placement per_batch: {self.num_safe / len(self):.3g} of {rows_per_step} rows a "
                f"step is {share:.3g} safe rows, no whole number; change safe_fraction or the "
                "batch, or use every_k"
            )
        return whole


def load_rows(
    cfg: DictConfig, origin: Origin, tokenizer: Any, defenses: Sequence[Defense], *, quiet: bool
) -> Rows:
    """Build `cfg.dataset` (one torchtune data set, or a list of them) and tokenize all of it.

    Its files must have passed `check_data_files`.

    Args:
        cfg: The run's config.
        origin: Where its keys were written.
        tokenizer: torchtune's model transform.
        defenses: Those that change messages do so before the tokenizer sees them.
        quiet: Show no progress bar (every process but the first).

    Raises:
        UserError: Broken data files, a row that cannot be tokenized, no row with a label.
    """
    transform = DefendedTokenizer(tokenizer, defenses)
    entries = (
        [f"dataset.{i}" for i in range(len(cfg.dataset))]
        if isinstance(cfg.dataset, ListConfig)
        else ["dataset"]
    )
    with data_sets_read_with(load_dataset, CheckedTransform, CheckedTexts):
        children = [build(cfg, key, origin, transform) for key in entries]
    if len(children) > 1:
        # As torchtune's recipes do: packed and unpacked data sets cannot be mixed.
        try:
            ConcatDataset(datasets=children)
        except ValueError as error:
            raise UserError(f"{origin.at('dataset')}: {error}") from None
    placement: Placement = "shuffle"
    safe_ce_weight = 1.0
    for key, child in zip(entries, children, strict=True):
        if isinstance(child, InterleavedDataset):
            if len(children) > 1:
                raise UserError(f"{origin.at(key)}: an interleaved set must be the only data set")
            placement, safe_ce_weight = child.placement, child.safe_ce_weight
    samples: list[dict[str, Any]] = []
    dropped = 0
    for key, child in zip(entries, children, strict=True):
        found, without_label = tokenize(child, origin.at(key), quiet)
        samples += found
        dropped += without_label
        if isinstance(child, InterleavedDataset) and found and without_label and not quiet:
            tell_share(found, child.num_safe, len(child), origin.at(key))
    try:
        transform.check()
    except UserError as error:
        raise UserError(f"{origin.at('dataset')}: {error}") from None
    if not samples:
        why = f"none of its {dropped} rows has a label" if dropped else "it has no rows"
        raise UserError(f"{origin.at('dataset')}: nothing to train on: {why}{_hint(dropped)}")
    if len({"seq_lens" in sample for sample in samples}) > 1:
        raise UserError(f"{origin.at('dataset')}: packed and unpacked rows cannot be mixed")
    grouped = bool(cfg.group_by_length)
    if grouped and (placement == "every_k" or "seq_lens" in samples[0]):
        why = (
            "packs all have one length"
            if "seq_lens" in samples[0]
            else "with placement every_k the order of rows is set; use shuffle or per_batch"
        )
        raise UserError(f"{origin.at('group_by_length')}: {why}")
    rows = Rows(samples, dropped, placement, safe_ce_weight, grouped)
    rows.ends = count_ends(samples, tokenizer)
    if not quiet:
        tell_losses(rows.ends, rows.dropped, rows.packed, origin.at("dataset"))
    return rows


def _hint(dropped: int) -> str:
    return "; raise tokenizer.max_seq_len, or train on rows with an answer" if dropped else ""


def micro_batch_rows(
    rows: Sequence[int], *, batch_size: int, rank: int, world_size: int
) -> list[list[int]]:
    """The rows of one process's micro-batches in a step: blocks dealt out to processes in turn."""
    blocks = [list(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    return blocks[rank::world_size]


def file_fingerprints(paths: Sequence[Path]) -> dict[str, str]:
    """SHA-256 of each file, by its path as given."""
    return {str(path): sha256(path) for path in paths}


def provenance_of(rows: Rows, data_files: list[Path], world_size: int) -> dict[str, Any]:
    """`environment`, with fingerprints of the data and how many rows they gave."""
    return {
        **environment(),
        "processes": world_size,
        "data_files": file_fingerprints(data_files),
        "rows": len(rows),
        "rows_safe": rows.num_safe,
        "rows_without_label_dropped": rows.dropped,
        "rows_cut": rows.ends.cut,
        "rows_without_stop": rows.ends.unended,
        "rows_fingerprint": rows.fingerprint,
    }
