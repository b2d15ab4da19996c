"""The excess over the frontier, by hand and on synthetic data with known truth."""

import numpy as np
import pytest

from emarecipes.comparison.frontier import Bound, Shifts, excess, on_curve


def curve(x: float, points: list[tuple[float, float]]) -> float:
    found = on_curve(
        np.array([[x]]),
        np.array([[[p[0] for p in points]]]),
        np.array([[[p[1] for p in points]]]),
    )
    return float(found[0, 0])


def test_interpolation_is_numpys() -> None:
    rng = np.random.default_rng(0)
    x, points_x = rng.uniform(-0.2, 1.4, (7, 3)), rng.uniform(0.05, 1, (7, 3, 5))
    points_y = rng.normal(size=(7, 3, 5))
    found = on_curve(x, points_x, points_y)
    for r, s in np.ndindex(7, 3):
        order = np.argsort(points_x[r, s])
        known_x = np.concatenate([[0.0], points_x[r, s][order]])
        known_y = np.concatenate([[0.0], points_y[r, s][order]])
        assert found[r, s] == pytest.approx(np.interp(x[r, s], known_x, known_y))


def test_by_hand() -> None:
    points = [(1.0, 0.6), (0.5, 0.2)]
    assert curve(0.25, points) == pytest.approx(0.1)
    assert curve(0.75, points) == pytest.approx(0.4)
    assert curve(2.0, points) == pytest.approx(0.6)  # Beyond the end.
    assert curve(-1.0, points) == 0.0
    assert curve(0.5, [(0.5, 0.2), (0.5, 0.4)]) in (0.2, 0.4)  # Two runs that learned the same.
    # Undefended training that moved in-domain to the other side.
    assert curve(0.2, [(-0.1, 0.3), (0.4, 0.2)]) == pytest.approx(0.1)


def shifts(x: float, y: float, seeds: int, rng: np.random.Generator) -> Shifts:
    own = rng.normal(0, 0.05, (seeds, 1))  # A seed that learns more also moves more.
    return Shifts(
        y + 0.5 * own + rng.normal(0, 0.05, (seeds, 50)), x + own + rng.normal(0, 0.05, (seeds, 40))
    )


def bound(of: Shifts) -> Bound:
    return Bound(0.25, of.general_SQ)


def test_learning_less_has_no_excess_and_a_defense_has_its_own() -> None:
    rng = np.random.default_rng(1)
    undefended = {str(x): shifts(x, 0.5 * x, 5, rng) for x in (0.25, 0.5, 0.75, 1.0)}
    slower = excess(shifts(0.6, 0.3, 5, rng), undefended, bound(undefended["1.0"]))
    low, high = slower.estimate.interval()
    assert low < 0 < high and high - low < 0.06
    defended = excess(shifts(0.6, 0.2, 5, rng), undefended, bound(undefended["1.0"]))
    low, high = defended.estimate.interval()
    assert low < -0.1 < high < 0
    # Its general shift alone, 0.2, is that of undefended training at 40 %.
    assert (defended.above, defended.below, defended.seeds) == (0, 0, 5)


def test_what_lies_beyond_the_curve_is_counted() -> None:
    rng = np.random.default_rng(2)
    undefended = {"1": shifts(0.5, 0.3, 3, rng)}
    assert excess(shifts(2.0, 0.3, 3, rng), undefended, bound(undefended["1"])).above == 3
    found = excess(shifts(-1.0, 0.1, 3, rng), undefended, bound(undefended["1"]))
    assert found.below == 3
    assert found.estimate.value == pytest.approx(0.1, abs=0.05)  # Compared with 0.
