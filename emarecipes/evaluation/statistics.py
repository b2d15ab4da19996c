"""Intervals over training seeds and questions. Shapes: S seeds, Q questions, R resamples."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest

from emarecipes.errors import UserError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its interval; both are NaN where there is none."""

    estimate: float
    low: float
    high: float


def question_bootstrap(values: ArrayLike, *, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Percentile 95 % interval of a mean over questions (Q,), for what has no seeds.

    Raises:
        UserError: No questions, or values that are not finite.
    """
    values_Q = finite_values(np.asarray(values)[None])[0]
    return answer_bootstrap(values_Q, range(len(values_Q)), resamples=resamples, seed=seed)


def answer_bootstrap(
    values: ArrayLike,
    questions: Sequence[Hashable],
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """The same of a mean over answers (N,), where a question may have several.

    Questions are drawn with all their answers, since answers to one question are alike. One
    question, drawn again and again, says nothing about others: there is no interval then.

    Args:
        values: One an answer.
        questions: Which question each is to.
        resamples: Number of resamples.
        seed: Of the resampling.
    """
    values_N = finite_values(np.asarray(values)[None])[0]
    places = {question: place for place, question in enumerate(dict.fromkeys(questions))}
    number_N = np.array([places[question] for question in questions])
    sums_Q = np.bincount(number_N, weights=values_N)
    counts_Q = np.bincount(number_N)
    count = len(sums_Q)
    if count < 2:
        return Interval(float(values_N.mean()), math.nan, math.nan)
    draws_RQ = np.random.default_rng(seed).multinomial(
        count, np.full(count, 1 / count), size=resamples
    )
    low, high = np.quantile((draws_RQ @ sums_Q) / (draws_RQ @ counts_Q), [0.025, 0.975])
    return Interval(float(values_N.mean()), float(low), float(high))


def share_bootstrap(hits: ArrayLike, questions: Sequence[Hashable]) -> Interval:
    """`answer_bootstrap` of a share.

    Where all answers agree a resample can only repeat them. There the interval is Wilson's for 0 of
    n or n of n, with n the number of questions: 0 to z^2 / (n + z^2), or 1 less than that to 1. Of
    a single question there is none either.
    """
    hits_N = np.asarray(hits, dtype=np.float64)
    found = answer_bootstrap(hits_N, questions)
    if 0.0 < found.estimate < 1.0 or math.isnan(found.low):
        return found
    return Interval(found.estimate, *wilson(found.estimate, len(set(questions))))


def wilson(share: float, count: int) -> tuple[float, float]:
    """Ends of Wilson's 95 % interval of a share that is 0 or 1 of `count` questions."""
    ends = binomtest(round(share) * count, count).proportion_ci(method="wilson")
    return float(ends.low), float(ends.high)


def alpha_bootstrap(
    scores: ArrayLike,
    questions: Sequence[Hashable],
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile 95 % interval of Krippendorff's alpha on an interval scale, over questions.

    alpha = 1 - D_o / D_e, with D_o the mean squared difference of two scores of one answer and D_e
    that of any two scores. Draws in which no score differs have no alpha and are left out.

    Args:
        scores: (J, N), J judges' of N answers; NaN where there is none. Answers with fewer than two
            are left out.
        questions: Which question each answer is to; they are drawn with all their answers.
        resamples: Number of resamples.
        seed: Of the resampling.
    """
    scores_JN = np.asarray(scores, dtype=np.float64)
    kept = np.isfinite(scores_JN).sum(axis=0) > 1
    asked = [question for question, keep in zip(questions, kept, strict=True) if keep]
    places = {question: place for place, question in enumerate(dict.fromkeys(asked))}
    count_N = np.isfinite(scores_JN[:, kept]).sum(axis=0)
    sum_N = np.nansum(scores_JN[:, kept], axis=0)
    squares_N = np.nansum(scores_JN[:, kept] ** 2, axis=0)
    # The sum over pairs of (x - y)^2 is 2 (m sum x^2 - (sum x)^2).
    within_N = 2 * (count_N * squares_N - sum_N**2) / (count_N - 1)
    sums_Q4 = np.zeros((len(places), 4))
    np.add.at(
        sums_Q4,
        [places[question] for question in asked],
        np.stack([count_N, sum_N, squares_N, within_N], axis=1),
    )

    def alpha(weights_RQ: Floats) -> Floats:
        n, total, squares, within = (weights_RQ @ sums_Q4).T
        with np.errstate(invalid="ignore", divide="ignore"):
            found = 1 - within * (n - 1) / (2 * (n * squares - total**2))
        return np.where(np.isfinite(found), found, np.nan)

    count = len(places)
    estimate = float(alpha(np.ones((1, count)))[0])
    if count < 2 or math.isnan(estimate):
        return Interval(estimate, math.nan, math.nan)
    even = np.full(count, 1 / count)
    draws_RQ = np.random.default_rng(seed).multinomial(count, even, size=resamples)
    low, high = np.nanquantile(alpha(draws_RQ.astype(np.float64)), [0.025, 0.975])
    return Interval(estimate, float(low), float(high))


def finite_values(values: ArrayLike) -> Floats:
    """Values by seed and question, (S, Q), in float64.

    Raises:
        UserError: There are none, or not all are finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or array.size == 0:
        raise UserError(f"an interval needs values by seed and question, not {array.shape}")
    if not np.isfinite(array).all():
        raise UserError("an interval needs finite values")
    return array
