"""Scores and ranks of candidates, from likelihoods and texts alone.

Source: Kaczer et al., arXiv 2508.06249, "Interleaving+" and "Interleaving++".

Shapes: N candidates, A misaligned models.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def relative_gap(aligned_N: Floats, misaligned_AN: Floats, eps: float) -> Floats:
    """How much likelier an answer is under the aligned model than under the misaligned ones, (N,).

    gap = (mean over A of NLL_misaligned - NLL_aligned) / (NLL_aligned + eps), with NLL the mean
    over the tokens of the answer.

    Args:
        aligned_N: Mean NLL under the aligned model.
        misaligned_AN: Mean NLL under each misaligned one.
        eps: Keeps an answer that the aligned model is sure of from an unbounded gap.
    """
    gap_N: Floats = (misaligned_AN.mean(axis=0) - aligned_N) / (aligned_N + eps)
    return gap_N


def by_gap(gap_N: Floats, eligible_N: NDArray[np.bool_]) -> list[int]:
    """The eligible candidates from the highest gap to the lowest; ties in the file's order."""
    order = np.argsort(-gap_N, kind="stable")
    return [int(index) for index in order if eligible_N[index]]


def pearson(x_N: Floats, y_N: Floats) -> float:
    """Pearson's correlation; NaN where one side does not vary or N < 2."""
    x, y = x_N - x_N.mean(), y_N - y_N.mean()
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / size if size > 0.0 else float("nan")


def spearman(x_N: Floats, y_N: Floats) -> float:
    """Spearman's rank correlation: Pearson's of the ranks, ties having their average rank."""
    return pearson(_ranks(x_N), _ranks(y_N))


def _ranks(x_N: Floats) -> Floats:
    _, inverse, counts = np.unique(x_N, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return np.asarray((last - (counts - 1) / 2.0)[inverse], dtype=np.float64)
