"""Log-probabilities of the same tokens, served and here: is the adapter there, and at which scale?

Shapes: T scored tokens of all answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

Floats = npt.NDArray[np.float64]

# Of what the adapter moves: nearer than SAME is the adapter itself, unless another tolerance is
# given; nearer than NEAR, something like it or like the base. Measured (docs/serving.md): a base of
# 8 bits is 0.02 away, one of 5 bits 0.23, another seed's adapter of the same rows 0.18.
SAME, NEAR = 0.1, 0.25
SCALE_TOLERANCE = 0.1
# A scale is named only if it takes off half of the distance to the nearer of adapter and base, so
# three quarters of the squares: another adapter of the same rows lies somewhere between, as well.
EXPLAINED = 0.5
# Root mean square of what an adapter must move to be told from none, in nats a token.
LEAST_SHIFT = 0.01
_LARGEST_SCALE = 8.0


@dataclass(frozen=True)
class Slope:
    """Of the served shift on ours, with a 95 % interval (nan where there is one answer)."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Found:
    """What a comparison of log-probabilities says.

    Distances are over all T tokens, in nats: root mean squares, but for `largest`.

    Attributes:
        verdict: `applied`, `base`, `scaled`, `alike` or `neither`.
        slope: 1 where the server computes the adapter, 0 where it computes the base.
        shift: From the base to the adapter, both here.
        to_adapter: From the served model to the adapter here.
        to_base: From the served model to the base here.
        largest: The largest difference of the served model from the adapter here.
        scale: Of the adapter, that comes nearest to the served model; None where not looked for.
        to_scaled: From the served model to the adapter at that scale.
    """

    verdict: str
    slope: Slope
    shift: float
    to_adapter: float
    to_base: float
    largest: float
    scale: float | None = None
    to_scaled: float | None = None


def slope_of(served_T: Floats, base_T: Floats, adapter_T: Floats, answers: Sequence[int]) -> Slope:
    """Least squares through the origin of y = served - base on d = adapter - base.

    s = sum(d y) / sum(d^2). Tokens of an answer are alike, so the interval is over G answers:
    s +- t(G - 1) * sqrt(G / (G - 1) * sum_g(sum_t in g d (y - s d))^2) / sum(d^2).

    Args:
        served_T: Log-probabilities, nats.
        base_T: The base's, here.
        adapter_T: The adapter's, here; not the base's very own.
        answers: Tokens of each answer, in order.
    """
    d_T, y_T = adapter_T - base_T, served_T - base_T
    square = float(d_T @ d_T)
    slope = float(d_T @ y_T) / square
    groups = len(answers)
    if groups < 2:
        return Slope(slope, math.nan, math.nan)
    ends = np.cumsum(answers)[:-1]
    sums = [float(part.sum()) for part in np.split(d_T * (y_T - slope * d_T), ends)]
    error = math.sqrt(groups / (groups - 1) * sum(x * x for x in sums)) / square
    half = float(stats.t.ppf(0.975, groups - 1)) * error
    return Slope(slope, slope - half, slope + half)


def compare(
    served_T: Floats,
    base_T: Floats,
    adapter_T: Floats,
    answers: Sequence[int],
    at_scale: Callable[[float], Floats],
    tolerance: float = SAME,
) -> Found:
    """Hold the served model against the adapter, the base, and the adapter at other scales.

    A slope is a scale only where the shift is small, since log-probabilities are no linear function
    of it. So where the server computes neither, the scale c is looked for whose log-probabilities
    here come nearest: argmin over 0 <= c <= 8 of sum((served - ours(c))^2). It is named where it
    leaves a quarter of the shift at most, and half of the distance to the nearer of both at most.
    What is within a quarter of the adapter, and not at another scale, is `alike`.

    Args:
        served_T: See `slope_of`.
        base_T: See `slope_of`.
        adapter_T: See `slope_of`.
        answers: See `slope_of`.
        at_scale: The log-probabilities here, with the adapter's scale times a number.
        tolerance: How far from the adapter, as a share of the shift, still is the adapter.
    """
    shift = distance(adapter_T, base_T)
    slope = slope_of(served_T, base_T, adapter_T, answers)
    to_adapter, to_base = distance(served_T, adapter_T), distance(served_T, base_T)
    largest = float(np.abs(served_T - adapter_T).max())

    def found(verdict: str, scale: float | None = None, rest: float | None = None) -> Found:
        return Found(verdict, slope, shift, to_adapter, to_base, largest, scale, rest)

    along = abs(slope.estimate - 1) <= SCALE_TOLERANCE
    if to_adapter <= tolerance * shift and along:
        return found("applied")
    if to_base <= NEAR * shift and abs(slope.estimate) <= SCALE_TOLERANCE:
        return found("base")
    scale, rest = _nearest(served_T, at_scale)
    is_scaled = rest <= min(NEAR * shift, EXPLAINED * min(to_adapter, to_base))
    alike = to_adapter <= NEAR * shift and along
    return found("scaled" if is_scaled else "alike" if alike else "neither", scale, rest)


def _nearest(served_T: Floats, at_scale: Callable[[float], Floats]) -> tuple[float, float]:
    """The scale that comes nearest, and its distance: the best of a coarse row, then refined."""
    coarse = [0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, _LARGEST_SCALE]
    distances = [distance(served_T, at_scale(scale)) for scale in coarse]
    best = int(np.argmin(distances))
    ends = coarse[max(best - 1, 0)], coarse[min(best + 1, len(coarse) - 1)]
    result = optimize.minimize_scalar(
        lambda scale: distance(served_T, at_scale(float(scale))),
        bounds=ends,
        method="bounded",
        options={"xatol": 1e-3 * max(coarse[best], 0.1), "maxiter": 12},
    )
    return float(result.x), float(result.fun)


def distance(one_T: Floats, other_T: Floats) -> float:
    """Root mean square of the difference."""
    return float(np.sqrt(np.mean((one_T - other_T) ** 2)))
