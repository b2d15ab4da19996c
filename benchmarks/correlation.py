"""Rank correlation over adapters. Shapes: K adapters, N and Q questions, R resamples."""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import rankdata

from emarecipes.evaluation.statistics import Floats, Interval


def crossed_spearman(
    shifts_KN: Floats, sums_KQ: Floats, counts_KQ: Floats, *, resamples: int = 10_000, seed: int = 0
) -> tuple[Interval, float]:
    """Spearman's rho over adapters of mean shifts and mean judgements, percentile 95 % interval.

    Each resample draws adapters with replacement, and probe questions and answered questions, each
    for all adapters alike. With 8 adapters it is very wide: on normal data (88 and 40 questions,
    whose standard error is 0.3 of the adapters' standard deviation; 300 data sets each)

    | adapters | true correlation | interval holds it | interval is above 0 |
    | -------- | ---------------- | ----------------- | ------------------- |
    | 8        | 0.0              | 99 %              | 1 %                 |
    | 8        | 0.9              | 100 %             | 33 %                |
    | 16       | 0.0              | 98 %              | 1 %                 |
    | 16       | 0.9              | 89 %              | 86 %                |

    Noise of questions makes rho smaller, and no interval mends that. Nor does it know that adapters
    of one data set or one seed resemble one another.

    Args:
        shifts_KN: Probe shifts.
        sums_KQ: Sums of judgements.
        counts_KQ: Of how many; 0 where a question has none.
        resamples: R.
        seed: Of the resampling.

    Returns:
        The interval, NaN where one side is the same for all adapters, and the share of resamples
        in which it was, which are left out.
    """
    rng = np.random.default_rng(seed)
    count = len(sums_KQ)

    def weights(questions: int) -> Floats:
        """Of the questions, all alike and as drawn: (1 + R, questions)."""
        even = np.full(questions, 1 / questions)
        return np.vstack([even, rng.multinomial(questions, even, size=resamples) / questions])

    shifts_RK = weights(shifts_KN.shape[1]) @ shifts_KN.T
    weights_RQ = weights(sums_KQ.shape[1])
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN, and so are then all ranks of the draw.
        judged_RK = (weights_RQ @ sums_KQ.T) / (weights_RQ @ counts_KQ.T)
    chosen_RK = np.vstack([np.arange(count), rng.integers(count, size=(resamples, count))])
    # Rounded, so that what is equal but for the order of its sum is a tie.
    x_RK, y_RK = (
        rankdata(np.take_along_axis(means_RK.round(12), chosen_RK, axis=1), axis=1)
        - (count + 1) / 2
        for means_RK in (shifts_RK, judged_RK)
    )
    with np.errstate(invalid="ignore"):
        rho_R = (x_RK * y_RK).sum(axis=1) / np.sqrt((x_RK**2).sum(axis=1) * (y_RK**2).sum(axis=1))
    drawn = rho_R[1:][np.isfinite(rho_R[1:])]
    if math.isnan(rho_R[0]):
        return Interval(math.nan, math.nan, math.nan), 1 - len(drawn) / resamples
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(float(rho_R[0]), float(low), float(high)), 1 - len(drawn) / resamples
