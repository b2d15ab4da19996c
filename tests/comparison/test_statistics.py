"""Intervals, Holm's correction and verdicts, on data whose answer is known."""

import math

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from emarecipes.comparison.statistics import (
    Contrast,
    Estimate,
    crossed_estimate,
    crossed_mean,
    holm,
    mean_over_seeds,
    verdicts,
)
from emarecipes.errors import UserError


def test_coverage_with_five_seeds() -> None:
    """Seeds, questions and noise vary; the truth is 0.3. Of 300 intervals 95 % are to hold it."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        values = 0.3 + rng.normal(0, 0.3, (5, 1)) + rng.normal(0, 0.5, (1, 60))
        low, high = crossed_mean(values + rng.normal(0, 0.3, (5, 60))).interval()
        hits += low <= 0.3 <= high
    # Two standard errors of a share of 0.95 over 300 are 0.025.
    assert 0.925 <= hits / 300 <= 0.99


def test_without_a_question_effect_it_is_students_interval() -> None:
    """Every question alike: what remains is the t test over seeds, as scipy has it."""
    seeds = np.array([0.1, 0.4, 0.2, 0.5])
    found = crossed_mean(seeds[:, None] * np.ones(30))
    expected = ttest_1samp(seeds, 0.0)
    assert found.freedom == pytest.approx(3)
    assert 2 * found.p_above(0.0) == pytest.approx(expected.pvalue)
    assert found.interval() == pytest.approx(tuple(expected.confidence_interval()))
    alone = mean_over_seeds(seeds)
    assert (alone.value, alone.error) == pytest.approx((found.value, found.error))


def test_without_a_seed_effect_it_is_the_standard_error_over_questions() -> None:
    questions = np.random.default_rng(1).normal(1, 1, 80)
    found = crossed_estimate(
        lambda shares: shares["q"] @ np.tile(questions, (3, 1)).T, {"q": 80}, resamples=20_000
    )
    assert found.error == pytest.approx(questions.std() / math.sqrt(80), rel=0.03)
    assert found.freedom == pytest.approx(79)


def test_one_seed_has_an_interval_over_questions_and_no_verdict() -> None:
    questions = np.random.default_rng(2).normal(1, 1, 50)
    found = crossed_mean(questions[None])
    assert found.value == pytest.approx(questions.mean())
    half = 2.0096 * questions.std() / math.sqrt(50)  # Student's t of 49 degrees of freedom.
    assert found.interval()[1] - found.value == pytest.approx(half, rel=0.05)
    assert found.p_below(9.0) == found.p_above(0.0) == found.p_within(9.0) == 1.0
    assert all(math.isnan(end) for end in crossed_mean(np.ones((1, 1))).interval())


@pytest.mark.parametrize(
    ("values", "message"),
    [(np.ones((2, 0)), "no question"), (np.full((2, 3), math.nan), "not finite")],
)
def test_what_has_no_estimate_is_refused(values: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        crossed_mean(values)


def test_holm_by_hand() -> None:
    """Sorted 0.01, 0.02, 0.04 times 3, 2, 1, made monotone."""
    assert holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])


def estimate(value: float, error: float = 0.01) -> Estimate:
    return Estimate(value, error, 50.0)


def test_verdicts() -> None:
    decisions = {
        "better": Contrast({"general": estimate(-0.2)}),
        "worse": Contrast({"general": estimate(-0.2), "conditional": estimate(0.2)}),
        "equivalent": Contrast({"general": estimate(0.005), "conditional": estimate(-0.005)}),
        "undecided": Contrast({"general": estimate(-0.2), "conditional": estimate(-0.01)}),
    }
    found = verdicts(list(decisions.values()), bound=0.05)
    assert [verdict.decision for verdict in found] == list(decisions)
    assert decisions["undecided"].worst == "conditional"


def test_the_family_costs_power() -> None:
    """p = 0.03 is a finding alone, and none among five."""
    single = Contrast({"general": estimate(-0.0223)})
    p, direction = single.p_difference()
    assert direction == "better" and 0.02 < p < 0.04
    assert verdicts([single], bound=0.001)[0].decision == "better"
    family = verdicts([single] * 5, bound=0.001)
    assert {verdict.decision for verdict in family} == {"undecided"}
    assert family[0].p_difference == pytest.approx(5 * p)


def test_no_defenses_no_verdicts() -> None:
    assert verdicts([], bound=0.1) == []
