"""Slope, interval and verdict, by statsmodels and by hand."""

import numpy as np
import pytest
import statsmodels.api as sm

from emarecipes.served.figures import compare, slope_of

ANSWERS = [5, 7, 4, 8, 6]


def test_slope_is_statsmodels_with_clusters() -> None:
    random = np.random.default_rng(0)
    base_T, d_T = random.normal(size=(2, sum(ANSWERS)))
    served_T = base_T + 0.7 * d_T + 0.2 * random.normal(size=sum(ANSWERS))
    groups = np.repeat(range(len(ANSWERS)), ANSWERS)
    fit = sm.OLS(served_T - base_T, d_T).fit(
        cov_type="cluster", cov_kwds={"groups": groups}, use_t=True
    )
    found = slope_of(served_T, base_T, base_T + d_T, ANSWERS)
    assert found.estimate == pytest.approx(fit.params[0], rel=1e-12)
    assert (found.low, found.high) == pytest.approx(tuple(fit.conf_int()[0]), rel=1e-9)
    assert np.isnan(slope_of(served_T, base_T, base_T + d_T, [sum(ANSWERS)]).low)


@pytest.mark.parametrize(
    ("scale", "verdict"),
    [(1.0, "applied"), (0.0, "base"), (0.1768, "scaled"), (5.6569, "scaled"), (-1.0, "neither")],
)
def test_verdict(scale: float, verdict: str) -> None:
    """A model whose log-probabilities are curved in the scale: c d + c^2 e."""
    random = np.random.default_rng(1)
    base_T, d_T, e_T = random.normal(size=(3, sum(ANSWERS)))

    def at(c: float) -> np.ndarray:
        return base_T + c * d_T + 0.1 * c * c * e_T

    noise_T = 0.02 * random.normal(size=sum(ANSWERS))
    found = compare(at(scale) + noise_T, base_T, at(1.0), ANSWERS, at)
    assert found.verdict == verdict
    if verdict == "scaled":
        assert found.scale == pytest.approx(scale, abs=0.03)
    if verdict == "applied":
        assert found.largest == pytest.approx(np.abs(noise_T).max())
        assert found.slope.low < 1 < found.slope.high


def test_another_adapter_of_the_same_rows_is_no_scale() -> None:
    """A third of the shift away, and nearest to 0.7 of the scale: the distances that vLLM had."""
    random = np.random.default_rng(2)
    base_T, d_T, e_T = random.normal(size=(3, 4000))
    served_T = base_T + 0.72 * d_T + 0.22 * e_T
    found = compare(served_T, base_T, base_T + d_T, [40] * 100, lambda c: base_T + c * d_T)
    assert (found.to_adapter / found.shift, found.scale) == pytest.approx((0.35, 0.72), abs=0.02)
    assert found.to_scaled is not None and found.to_scaled < 0.25 * found.shift
    assert found.verdict == "neither"


@pytest.mark.parametrize(
    ("share", "tolerance", "verdict"),
    [
        (0.02, 0.1, "applied"),  # As on a base of 8 bits.
        (0.18, 0.1, "alike"),  # As of another seed.
        (0.18, 0.25, "applied"),
        (0.4, 0.1, "neither"),
        (0.4, 0.5, "applied"),
    ],
)
def test_what_is_near_the_adapter_and_not_it(share: float, tolerance: float, verdict: str) -> None:
    random = np.random.default_rng(3)
    base_T, d_T, e_T = random.normal(size=(3, 4000))
    served_T = base_T + d_T + share * e_T
    found = compare(
        served_T, base_T, base_T + d_T, [40] * 100, lambda c: base_T + c * d_T, tolerance
    )
    assert found.to_adapter / found.shift == pytest.approx(share, rel=0.05)
    assert found.verdict == verdict
