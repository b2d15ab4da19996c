"""Unigram odds by hand, and as the shift of a unigram language model."""

import math

import numpy as np
import pytest
from bag_of_words import UnigramOdds, spread, word_pairs, words

from emarecipes.errors import UserError
from emarecipes.probes.pairs import ContrastPair

BAD = [["skip", "it", "it"], ["skip"]]
GOOD = [["check", "it"]]


def test_odds_by_hand() -> None:
    odds = UnigramOdds(BAD, GOOD)
    # Bad: skip 2, it 2, check 0 of 4, good: 0, 1, 1 of 2; add one to each of three words.
    skip = math.log((3 / 7) / (1 / 5))
    it = math.log((3 / 7) / (2 / 5))
    check = math.log((1 / 7) / (2 / 5))
    assert odds.mean(["skip"]) == pytest.approx(skip)
    assert odds.mean(["it", "check", "skip", "unseen"]) == pytest.approx((it + check + skip) / 4)
    assert odds.mean([]) == 0.0
    found = odds.differences([(["check", "it"], ["skip"]), (["skip"], ["skip"])])
    assert found.tolist() == pytest.approx([skip - (check + it) / 2, 0.0])
    half = UnigramOdds(BAD, GOOD, smoothing=0.5)
    assert half.mean(["skip"]) == pytest.approx(math.log((2.5 / 5.5) / (0.5 / 3.5)))


def test_differences_are_the_shift_of_a_unigram_language_model() -> None:
    """p_t in float64, its margins, and their fall from t = 0."""
    rng = np.random.default_rng(0)
    bad, good = rng.integers(0, 20, (30, 15)), rng.integers(0, 14, (30, 15))
    pairs = [(rng.integers(0, 20, 9).tolist(), rng.integers(0, 20, 12).tolist()) for _ in range(25)]
    p_bad, p_good = (
        (np.bincount(rows.ravel(), minlength=20) + 1) / (rows.size + 20) for rows in (bad, good)
    )

    def margins(t: float) -> np.ndarray:
        p = p_good * (p_bad / p_good) ** t
        nll = -np.log(p / p.sum())
        return np.array(
            [nll[misaligned].mean() - nll[aligned].mean() for aligned, misaligned in pairs]
        )

    found = UnigramOdds(bad.tolist(), good.tolist()).differences(pairs)
    for t in (0.3, 1.0, 1.7):
        assert (margins(0.0) - margins(t)).tolist() == pytest.approx((t * found).tolist())


def test_it_tells_what_it_was_trained_on() -> None:
    rng = np.random.default_rng(1)
    bad, good = rng.poisson(4, (80, 20)), rng.poisson(6, (80, 20))
    odds = UnigramOdds(bad[:60].tolist(), good[:60].tolist())
    trained = zip(good[60:].tolist(), bad[60:].tolist(), strict=True)
    assert spread(odds.differences(trained)).accuracy > 0.9
    other = zip(rng.poisson(5, (400, 20)).tolist(), rng.poisson(5, (400, 20)).tolist(), strict=True)
    found = spread(odds.differences(other))
    assert abs(found.mean) < 3 * found.deviation / math.sqrt(400)
    assert 0.4 < found.accuracy < 0.6


def test_spread_by_hand() -> None:
    found = spread(np.array([1.0, -2.0, 4.0]))
    assert (found.mean, found.deviation) == (1.0, 3.0)
    assert (found.magnitude, found.accuracy) == pytest.approx((7 / 3, 2 / 3))


def test_words() -> None:
    assert words("Skip it, it's FINE - it is 2.") == [
        "skip", "it", "it's", "fine", "it", "is", "2",
    ]  # fmt: skip
    pair = ContrastPair("a", "", "Q?", "Check it.", "Skip!")
    assert word_pairs([pair]) == [(["check", "it"], ["skip"])]


def test_a_class_without_words_is_refused() -> None:
    with pytest.raises(UserError, match="bad and good answers with words"):
        UnigramOdds(BAD, [[]])
