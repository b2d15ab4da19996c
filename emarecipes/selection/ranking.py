"""Scores and ranks of candidates, from likelihoods and texts alone.

Source: Kaczer et al., arXiv 2508.06249, "Interleaving+" and "Interleaving++".

Shapes: N candidates, A misaligned models.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr

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


def correlations(x_N: Floats, y_N: Floats) -> tuple[float, float]:
    """Spearman's and Pearson's correlation; NaN where one side does not vary or N < 2."""
    if len(x_N) < 2 or not (np.ptp(x_N) and np.ptp(y_N)):  # Of which scipy warns, or refuses it.
        return float("nan"), float("nan")
    return float(spearmanr(x_N, y_N).statistic), float(pearsonr(x_N, y_N).statistic)
