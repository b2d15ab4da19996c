"""What single words explain: unigram models of bad and good training answers.

If a probe's two answers differ in the same words as the training answers do, a model that learned
nothing but those words would move on the probe too. Two checks, one model class:

- over words, a naive Bayes classifier: are register controls as far apart as general pairs?
- over the language model's tokens, a unigram language model: does going from the good answers'
  unigram to the bad answers' one reproduce the language model's shift?
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emarecipes.datasets._overlaps import ngrams
from emarecipes.errors import UserError
from emarecipes.probes.pairs import ContrastPair

Floats = NDArray[np.float64]
Units = Sequence[Hashable]


def words(text: str) -> Units:
    """A text's words, lower case, without punctuation."""
    return [gram[0] for gram in ngrams(text, 1)]


class UnigramOdds:
    """log p(unit | bad) - log p(unit | good), add-one smoothed.

    p(u | c) = (count of u in c + smoothing) / (units in c + smoothing * number of different units).
    Units that neither class has seen say nothing: their odds are 0.

    Args:
        bad: Units of each bad training answer.
        good: The same of the good ones.
        smoothing: Added to every count.

    Raises:
        UserError: A class without any unit.
    """

    def __init__(self, bad: Iterable[Units], good: Iterable[Units], smoothing: float = 1.0) -> None:
        counts = [Counter(unit for answer in answers for unit in answer) for answers in (bad, good)]
        if not all(counts):
            raise UserError("a unigram model needs bad and good answers with words in them")
        known = set(counts[0]) | set(counts[1])
        totals = [count.total() + smoothing * len(known) for count in counts]
        self._odds = {
            unit: float(
                np.log((counts[0][unit] + smoothing) / totals[0])
                - np.log((counts[1][unit] + smoothing) / totals[1])
            )
            for unit in known
        }

    def mean(self, units: Units) -> float:
        """Mean log odds a unit, in nats: positive for what resembles the bad answers."""
        return float(np.mean([self._odds.get(unit, 0.0) for unit in units])) if units else 0.0

    def differences(self, pairs: Iterable[tuple[Units, Units]]) -> Floats:
        """mean(misaligned) - mean(aligned) of each (aligned, misaligned) pair, (N,).

        With p_t(u) proportional to p(u | good) * (p(u | bad) / p(u | good))^t, a unigram language
        model that t takes from the good answers (0) to the bad ones (1), the probe shift of p_t
        against p_0 is exactly t times this: the normaliser is in both answers' mean NLL.
        """
        return np.array([self.mean(bad) - self.mean(good) for good, bad in pairs])


@dataclass(frozen=True)
class Spread:
    """How far a bag of words puts the answers of a file's pairs apart, in nats a word.

    Attributes:
        mean: Of the log-odds differences, misaligned minus aligned.
        deviation: Their standard deviation.
        magnitude: Mean of their absolute values.
        accuracy: Share of pairs whose misaligned answer has the larger log odds.
    """

    mean: float
    deviation: float
    magnitude: float
    accuracy: float


def spread(differences: Floats) -> Spread:
    """The spread of the log-odds differences of N >= 2 pairs."""
    return Spread(
        mean=float(differences.mean()),
        deviation=float(differences.std(ddof=1)),
        magnitude=float(np.abs(differences).mean()),
        accuracy=float((differences > 0).mean()),
    )


def word_pairs(pairs: Iterable[ContrastPair]) -> list[tuple[Units, Units]]:
    """The words of both answers of each pair, aligned first."""
    return [(words(pair.aligned), words(pair.misaligned)) for pair in pairs]
