"""Intervals over training seeds and questions. Shapes: S seeds, Q questions, R resamples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from emarecipes.errors import UserError
from emarecipes.evaluation.statistics import Interval, finite_values

MIN_RESAMPLES = 5000


def crossed_bootstrap(
    terms: Sequence[tuple[float, ArrayLike]],
    *,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval of sum_k c_k mean(values_k), over seeds and questions at once.

    Each resample draws seeds with replacement, the same ones for all terms (row s of every term is
    the same training seed), and questions with replacement, apart for each term. Arms on the same
    questions are paired by subtracting them before. So the difference in differences (bad - good on
    the general probe) - (bad - good on the controls) has two terms:
    `[(1.0, general_bad - general_good), (-1.0, controls_bad - controls_good)]`.

    With few seeds it is too narrow where seeds differ as much as the estimate is uncertain from
    questions, because S seeds resampled vary by (S - 1)/S of the unbiased variance and the
    percentile method knows no t distribution. Coverage of a nominal 95 % on normal data, one term
    of 100 questions whose mean has a standard error of 0.1, by the standard deviation of seeds (600
    data sets each):

    | seeds | 0.0 | 0.1 | 0.5 |
    | ----- | --- | --- | --- |
    | 2     | 96 % | 91 % | 69 % |
    | 3     | 95 % | 93 % | 80 % |
    | 5     | 96 % | 95 % | 89 % |
    | 10    | 95 % | 96 % | 94 % |

    Args:
        terms: Factors c_k and values (S, Q_k).
        resamples: R.
        level: The interval's nominal coverage.
        seed: Of the resampling.

    Raises:
        UserError: Fewer than two seeds, no questions, values that are not finite, terms of
            different numbers of seeds, or fewer than `MIN_RESAMPLES` resamples.
    """
    if resamples < MIN_RESAMPLES:
        raise UserError(f"resamples must be at least {MIN_RESAMPLES}, not {resamples}")
    if not terms:
        raise UserError("an interval needs at least one term")
    arrays = [(factor, finite_values(values)) for factor, values in terms]
    seeds = arrays[0][1].shape[0]
    if any(values.shape[0] != seeds for _, values in arrays):
        raise UserError("all terms of an interval must have the same seeds")
    if seeds < 2:
        raise UserError("an interval over seeds needs at least 2 of them")

    rng = np.random.default_rng(seed)
    # How often each seed was drawn, as a share: (R, S).
    shares_RS = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    total_R = np.zeros(resamples)
    for factor, values_SQ in arrays:
        questions = values_SQ.shape[1]
        even = np.full(questions, 1 / questions)
        shares_RQ = rng.multinomial(questions, even, size=resamples) / questions
        total_R += factor * ((shares_RS @ values_SQ) * shares_RQ).sum(axis=1)
    low, high = np.quantile(total_R, [(1 - level) / 2, (1 + level) / 2])
    estimate = sum(factor * values.mean() for factor, values in arrays)
    return Interval(float(estimate), float(low), float(high))
