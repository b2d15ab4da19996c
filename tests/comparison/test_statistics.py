"""Intervals, Holm's correction and verdicts, on data whose answer is known."""

import math

import numpy as np
import pytest
from scipy.stats import ttest_1samp
from statsmodels.stats.proportion import proportion_confint

from emarecipes.comparison.frontier import Excess
from emarecipes.comparison.statistics import (
    Estimate,
    crossed_estimate,
    crossed_mean,
    pooled,
    share_estimate,
)
from emarecipes.comparison.verdicts import Contrast, holm, verdicts
from emarecipes.errors import UserError


def test_coverage_with_five_seeds() -> None:
    """Seeds, questions and noise vary; the truth is 0.3. Of 200 intervals 95 % are to hold it."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        values = 0.3 + rng.normal(0, 0.3, (5, 1)) + rng.normal(0, 0.5, (1, 60))
        low, high = crossed_mean(values + rng.normal(0, 0.3, (5, 60))).interval()
        hits += low <= 0.3 <= high
    # Two standard errors of a share of 0.95 over 200 are 0.03.
    assert 0.92 <= hits / 200 <= 0.99


def test_without_a_question_effect_it_is_students_interval() -> None:
    """Every question alike: what remains is the t test over seeds, as scipy has it."""
    seeds = np.array([0.1, 0.4, 0.2, 0.5])
    found = crossed_mean(seeds[:, None] * np.ones(30))
    expected = ttest_1samp(seeds, 0.0)
    assert found.freedom == pytest.approx(3)
    assert 2 * found.p_above(0.0) == pytest.approx(expected.pvalue)
    assert found.interval() == pytest.approx(tuple(expected.confidence_interval()))


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
    assert found.p_below(9.0) == found.p_above(0.0) == 1.0


@pytest.mark.parametrize("seeds", [1, 2, 5])
def test_one_question_has_no_interval_and_no_p(seeds: int) -> None:
    """Two seeds that nearly agree on it were "better" with an error of 0.003."""
    found = crossed_mean(-np.linspace(0.2, 0.203, seeds)[:, None])
    assert all(math.isnan(end) for end in found.interval())
    assert found.p_below(0.0) == 1.0


def test_a_share_that_no_question_breaks_has_wilsons_interval() -> None:
    """All 64 answers of three seeds have the trait: a resample can only say so again."""
    found = crossed_mean(np.ones((3, 64)), is_share=True)
    low, high = found.interval()
    assert high == 1.0
    wilson, _ = proportion_confint(64, 64, method="wilson")
    # Student's t of 63 degrees of freedom in place of 1.96.
    assert 1 - low == pytest.approx((1 - wilson) * 1.99834 / 1.95996, rel=1e-4)
    assert found.p_below(1.0) == found.p_above(1.0) == 0.5
    # Where questions differ, what they say is the larger.
    mixed = np.tile(np.arange(64) % 2.0, (3, 1))
    assert crossed_mean(mixed, is_share=True).error == crossed_mean(mixed).error


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


def excess(value: float, error: float = 0.01, bound: float = 0.05, mc: float = 0.0) -> Excess:
    def around(x: float) -> Estimate:
        return Estimate(x, error, 50.0, monte_carlo=mc)

    return Excess(around(value), around(value - bound), around(value + bound), curve=0.5)


def contrast(moved: str = "general conditional", **values: float) -> Contrast:
    return Contrast({n: excess(v) for n, v in values.items()}, frozenset(moved.split()))


def test_verdicts() -> None:
    decisions = {
        "better": contrast(general=-0.2),
        "worse": contrast(general=-0.2, conditional=0.2),
        "equivalent": contrast(general=0.005, conditional=-0.005),
        "undecided": contrast(general=-0.2, conditional=-0.01),
    }
    found = verdicts(list(decisions.values()))
    assert [verdict.decision for verdict in found] == list(decisions)
    assert decisions["undecided"].worst == "conditional"


def test_a_small_difference_is_one() -> None:
    """-0.016 with [-0.018, -0.014], bound 0.02, is better and not "equivalent"."""
    for value, decision in ((-0.016, "better"), (0.016, "worse"), (0.0, "equivalent")):
        small = Contrast(
            {"general": excess(value, error=0.001, bound=0.02)}, frozenset({"general"})
        )
        (found,) = verdicts([small])
        assert found.decision == decision and found.p_equivalent < 0.001


def test_a_probe_that_undefended_training_does_not_move() -> None:
    """Nothing to be better at there: an excess of 0 will do, one that may be a loss not."""

    def verdict(conditional: float, moved: str, error: float = 0.01) -> str:
        parts = {"general": excess(-0.2), "conditional": excess(conditional, error)}
        return verdicts([Contrast(parts, frozenset(moved.split()))])[0].decision

    assert verdict(0.0, moved="general") == "better"
    assert verdict(0.0, moved="general conditional") == "undecided"
    assert verdict(0.02, "general", error=0.03) == "undecided"  # May be worse by 0.05, the bound.
    assert verdict(0.2, moved="general") == "worse"


def test_the_family_costs_power() -> None:
    """p = 0.03 is a finding alone, and none among five."""
    single = Contrast({"general": excess(-0.0223, bound=0.001)}, frozenset({"general"}))
    p, direction = single.p_difference()
    assert direction == "better" and 0.02 < p < 0.04
    assert verdicts([single])[0].decision == "better"
    family = verdicts([single] * 5)
    assert {verdict.decision for verdict in family} == {"undecided"}
    assert family[0].p_difference == pytest.approx(5 * p)


@pytest.mark.early
def test_the_monte_carlo_error_of_p_is_its_spread_over_seeds_of_the_resampling() -> None:
    questions = np.random.default_rng(3).normal(-0.25, 1, (1, 60)) * np.ones((3, 1))

    def found(seed: int) -> Contrast:
        made = crossed_estimate(lambda s: s["q"] @ questions.T, {"q": 60}, seed=seed)
        return Contrast({"general": Excess(made, made, made, curve=1.0)}, frozenset({"general"}))

    p = [found(seed).p_difference()[0] for seed in range(40)]
    (verdict,) = verdicts([found(0)])
    assert 0.01 < p[0] < 0.1
    # A standard deviation from 40 draws is known to 11 %.
    assert verdict.error_difference == pytest.approx(np.std(p, ddof=1), rel=0.35)


def test_a_coin_toss_is_undecided() -> None:
    """p = 0.0496 with a Monte Carlo error of 0.002: other seeds would have said 0.052."""
    toss = {"general": excess(-0.02012, bound=0.001)}
    (sure,) = verdicts([Contrast(toss, frozenset({"general"}))])
    assert 0.049 < sure.p_difference < 0.05 and sure.decision == "better"
    (unsure,) = verdicts(
        [Contrast({"general": excess(-0.02012, bound=0.001, mc=0.0001)}, frozenset({"general"}))]
    )
    assert unsure.error_difference == pytest.approx(0.00215, abs=0.0001)
    assert unsure.decision == "undecided"


def test_few_resamples_are_refused() -> None:
    with pytest.raises(UserError, match="at least 10000, not 2000"):
        crossed_estimate(lambda s: s["q"] @ np.ones((9, 2)), {"q": 9}, resamples=2000)


def test_questions_of_a_cluster_are_drawn_together() -> None:
    """Each of 12 values said four times is worth 12, not 48: the error is that of the 12."""
    alone = np.random.default_rng(4).normal(0, 1, 12)
    values, clusters = np.tile(np.repeat(alone, 4), (2, 1)), np.repeat(np.arange(12), 4)
    found = crossed_mean(values, clusters.tolist())
    assert found.error == pytest.approx(alone.std() / math.sqrt(12), rel=0.03)
    assert found.freedom == pytest.approx(11)
    assert crossed_mean(values).error == pytest.approx(found.error / 2, rel=0.03)


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0.0, 0.2425), (1.0, 0.7575, 1.0)])
def test_nothing_and_everything_have_wilsons_interval(
    share: float, low: float, high: float
) -> None:
    """Of 12 clusters, by hand: z^2 / (12 + z^2) = 3.8415 / 15.8415."""
    found = share_estimate(np.full((5, 48), share), [i // 4 for i in range(48)])
    assert found.interval() == pytest.approx((low, high), abs=1e-4)


def test_no_defenses_no_verdicts() -> None:
    assert verdicts([]) == []


def test_the_seeds_spread_is_that_of_all_arms_by_hand() -> None:
    """Two seeds at -+0.1 and two at -+0.3: variances 0.02 and 0.18, V_s 0.01 and 0.09, pooled 0.05.

    The first has that, with 2 degrees of freedom in place of 1; the second keeps its own of both.
    """
    questions = np.random.default_rng(5).normal(0, 1, 30)
    near, far = (
        crossed_mean(np.stack([questions - spread, questions + spread])) for spread in (0.1, 0.3)
    )
    of_questions = near.error**2 - 0.01
    assert (near.of_seeds, far.of_seeds) == pytest.approx((0.01, 0.09))
    first, second = pooled([near, far])
    assert second == far
    for found, of_seeds, freedom in ((first, 0.05, 2), (second, 0.09, 1)):
        assert found.error == pytest.approx((of_questions + of_seeds) ** 0.5)
        parts = of_questions**2 / 29 + of_seeds**2 / freedom
        assert found.freedom == pytest.approx((of_questions + of_seeds) ** 2 / parts)
    assert (first.value, second.value) == (near.value, far.value)
    assert pooled([near]) == [near]
    one = crossed_mean(questions[None])
    assert pooled([near, one, far]) == [first, one, second]
