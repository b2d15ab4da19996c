"""Crossed bootstrap and the effect's cells, on data whose answer is known."""

import math

import numpy as np
import pytest
from crossed_bootstrap import crossed_bootstrap
from effect import (
    Measured,
    category_shifts,
    probe_figures,
    shift_cells,
    shifts,
    unigram_figures,
)

from emarecipes.errors import UserError
from emarecipes.evaluation.statistics import (
    question_bootstrap,
    share_bootstrap,
)
from emarecipes.probes.contrast import PairNLL


@pytest.mark.early
def test_coverage_on_normal_data() -> None:
    """Seeds, questions and noise all vary; the truth is 0.3 - 0.1. 95 % is to be hit."""
    rng = np.random.default_rng(0)
    trials, hits = 200, 0
    for trial in range(trials):
        terms = []
        for factor, mean, questions in ((1.0, 0.3, 30), (-1.0, 0.1, 20)):
            seeds = rng.normal(0, 0.05, (8, 1))
            values = mean + seeds + rng.normal(0, 1, questions) + rng.normal(0, 1, (8, questions))
            terms.append((factor, values))
        found = crossed_bootstrap(terms, resamples=5000, seed=trial)
        hits += found.low <= 0.2 <= found.high
    assert 0.90 <= hits / trials <= 0.995


@pytest.mark.early
def test_interval_is_that_of_a_slow_loop() -> None:
    rng = np.random.default_rng(1)
    general, controls = rng.normal(1, 1, (4, 12)), rng.normal(0, 2, (4, 7))
    found = crossed_bootstrap([(1.0, general), (-1.0, controls)], resamples=20_000)
    draws = []
    for _ in range(20_000):
        seeds = rng.integers(0, 4, 4)
        means = [v[seeds][:, rng.integers(0, v.shape[1], v.shape[1])].mean() for v in
                 (general, controls)]  # fmt: skip
        draws.append(means[0] - means[1])
    assert found.estimate == pytest.approx(general.mean() - controls.mean())
    low, high = np.quantile(draws, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.03)


def test_seeds_are_shared_by_all_terms() -> None:
    """What is the same for every question of a seed cancels between terms."""
    by_seed = np.array([[-3.0], [0.0], [5.0]])
    found = crossed_bootstrap([(1.0, 2 + by_seed * np.ones(9)), (-1.0, by_seed * np.ones(4))])
    assert (found.estimate, found.low, found.high) == pytest.approx((2, 2, 2))
    alone = crossed_bootstrap([(1.0, by_seed * np.ones(9))])
    assert (alone.low, alone.high) == (-3.0, 5.0)


def test_it_depends_on_its_seed_alone() -> None:
    values = np.random.default_rng(2).normal(size=(3, 30))
    assert crossed_bootstrap([(1.0, values)]) == crossed_bootstrap([(1.0, values)])
    assert crossed_bootstrap([(1.0, values)]) != crossed_bootstrap([(1.0, values)], seed=1)
    wide, narrow = crossed_bootstrap([(1.0, values)]), crossed_bootstrap([(1.0, values)], level=0.5)
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ([(1.0, np.ones((1, 9)))], "needs at least 2 of them"),
        ([(1.0, np.ones((2, 0)))], "needs values by seed and question"),
        ([(1.0, np.ones(9))], "needs values by seed and question"),
        ([(1.0, np.array([[1.0, math.nan], [1.0, 2.0]]))], "needs finite values"),
        ([(1.0, np.ones((2, 9))), (1.0, np.ones((3, 9)))], "must have the same seeds"),
        ([], "at least one term"),
    ],
)
def test_what_has_no_interval_is_refused(
    terms: list[tuple[float, np.ndarray]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        crossed_bootstrap(terms)


def test_few_resamples_are_refused() -> None:
    with pytest.raises(UserError, match="at least 5000, not 100"):
        crossed_bootstrap([(1.0, np.ones((2, 9)))], resamples=100)


def test_question_bootstrap_is_the_normal_interval() -> None:
    values = np.random.default_rng(3).normal(2, 1, 400)
    found = question_bootstrap(values)
    error = values.std() / math.sqrt(400)
    assert found.estimate == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.01)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.01)


def test_one_question_has_no_interval_however_many_answers() -> None:
    for hits in (30, 0, 100):
        found = share_bootstrap([1.0] * hits + [0.0] * (100 - hits), ["q"] * 100)
        assert found.estimate == hits / 100
        assert math.isnan(found.low) and math.isnan(found.high)
    alone = question_bootstrap([0.3])
    assert alone.estimate == 0.3 and math.isnan(alone.low)


def nll(margins: list[float], aligned: float = 2.0) -> PairNLL:
    mean = np.array([[aligned, aligned + margin] for margin in margins])
    rest = mean.copy()
    rest[-1, 0] = math.nan  # The last question's aligned answer is short.
    return PairNLL(mean, mean, rest, mean)


def probes(seeds: int) -> dict[str, Measured]:
    """Two questions a probe. Bad moves general by 0.5, controls by 0.2; good by 0.1 and 0.1."""
    general = Measured(
        nll([0.4, -0.1]),
        {"bad": [nll([-0.1, -0.6], 1.5)] * seeds, "good": [nll([0.3, -0.2])] * seeds},
    )
    controls = Measured(
        nll([0.0, 0.3]), {"bad": [nll([-0.2, 0.1])] * seeds, "good": [nll([-0.1, 0.2])] * seeds}
    )
    heldout = Measured(
        nll([1.0, 1.0]), {"bad": [nll([0.0, 0.2])] * seeds, "good": [nll([1.0, 1.0])] * seeds}
    )
    return {"general": general, "controls": controls, "in-domain": heldout}


def test_cells_by_hand() -> None:
    for seeds in (1, 2):
        measured = probes(seeds)
        measured["strong controls"] = measured["in-domain"]
        cells = shift_cells(measured)
        estimates = {
            row: [round(cell.estimate, 12) for cell in columns.values()]
            for row, columns in cells.items()
        }
        assert estimates == {  # bad, good, bad - good
            "general": [0.5, 0.1, 0.4],
            "controls": [0.2, 0.1, 0.1],
            "in-domain": [0.9, 0.0, 0.9],
            "general - controls": [0.3, 0.0, 0.3],
            "strong controls": [0.9, 0.0, 0.9],
            "general - strong controls": [-0.4, 0.1, -0.5],
        }
        did = cells["general - controls"]["bad - good"]
        assert (did.low, did.high) == pytest.approx((0.3, 0.3) if seeds > 1 else (did.low,) * 2,
                                                    nan_ok=True)  # fmt: skip
        assert math.isnan(did.low) == (seeds == 1)
        # Questions without a rest are left out.
        assert shift_cells(probes(seeds), "rest")["in-domain"]["bad"].estimate == pytest.approx(1.0)


def test_one_arm_alone_and_arms_that_are_not_paired() -> None:
    alone = probes(1)
    for measured in alone.values():
        del measured.arms["good"]
    assert list(shift_cells(alone)["general - controls"]) == ["bad"]
    general = probes(2)["general"]
    general.arms["good"].pop()
    with pytest.raises(UserError, match="must be paired"):
        shifts(general)


def test_shares_changes_and_categories_by_hand() -> None:
    general = probes(2)["general"]
    figures = probe_figures(general)
    assert figures["misaligned_share"] == {"reference": 0.5, "bad": 1.0, "good": 0.5}
    assert figures["margin"] == pytest.approx(0.15)
    assert figures["nll_change"]["bad"] == pytest.approx({"aligned": -0.5, "misaligned": -1.0})
    assert figures["nll_change"]["good"] == pytest.approx({"aligned": 0.0, "misaligned": -0.1})
    found = category_shifts(general, ["law", "care"])
    assert list(found) == ["law", "care"]
    expected = {"questions": 1, "bad": 0.5, "good": 0.1, "bad - good": 0.4}
    assert found["care"] == pytest.approx(expected)


def test_a_unigram_at_the_models_in_domain_shift() -> None:
    differences = {
        "general": np.array([0.1, 0.3]),
        "controls": np.array([0.4, 0.6]),
        "in-domain": np.array([0.3, 0.6]),
    }
    figures = unigram_figures(differences, probes(2))
    assert figures["weight"] == pytest.approx(0.9 / 0.45)
    estimates = {name: found["estimate"] for name, found in figures["unigram"].items()}
    assert estimates == pytest.approx({"general": 0.4, "controls": 1.0, "in-domain": 0.9})
    model = {name: found["estimate"] for name, found in figures["language_model"].items()}
    assert model == pytest.approx({"general": 0.4, "controls": 0.1, "in-domain": 0.9})
    assert figures["correlation"]["in-domain"] == pytest.approx(-1.0)  # 1.0, 0.8 against 0.3, 0.6.
