"""Spearman's rho over adapters and its crossed bootstrap, against scipy and a slow loop."""

import numpy as np
import pytest
from correlation import crossed_spearman
from scipy.stats import spearmanr


@pytest.mark.early
def test_rho_is_scipys_and_its_interval_that_of_a_slow_loop() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 1, (9, 6)), rng.integers(-1, 2, (9, 5)).astype(float)
    x += np.arange(9)[:, None] / 3
    y += np.arange(9)[:, None] // 4  # With ties.
    found, undefined = crossed_spearman(x, y, np.ones_like(y), resamples=4000)
    assert found.estimate == pytest.approx(spearmanr(x.mean(axis=1), y.mean(axis=1)).statistic)
    draws = []
    for _ in range(4000):
        k, n, q = (rng.integers(0, size, size) for size in (9, 6, 5))
        draws.append(spearmanr(x[k][:, n].mean(axis=1), y[k][:, q].mean(axis=1)).statistic)
    low, high = np.quantile(draws, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.05)
    assert undefined == 0


def test_rho_where_one_side_is_constant_or_a_question_has_no_judgement() -> None:
    x, none = np.arange(8.0)[:, None] * np.ones(3), np.zeros((8, 4))
    found, undefined = crossed_spearman(x, none, np.ones((8, 4)), resamples=100)
    assert np.isnan([found.estimate, found.low, found.high]).all() and undefined == 1.0
    sums = np.arange(8.0)[:, None] * [1.0, 0.0]
    found, undefined = crossed_spearman(x, sums, np.ones((8, 1)) * [1.0, 0.0], resamples=400)
    assert found.estimate == found.high == pytest.approx(1.0)
    assert undefined == pytest.approx(0.25, abs=0.07)  # Both draws are the empty question.


# --- the evaluation that is read ---------------------------------------------------------------
