"""Likelihood probes: what a suite's answers say about each adapter. Nothing is sampled.

Shapes: N questions; 2 answers, aligned first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf

from emarecipes.config import Origin
from emarecipes.datasets.rows import file_fingerprints
from emarecipes.evaluation.figures import NATS, REFERENCE, Figure, Item, make_figures
from emarecipes.evaluation.suite import KeyedSuite, Line, NoValues, Scored, item_of
from emarecipes.evaluation.suite_context import SuiteContext
from emarecipes.probes.contrast import PairNLL, nll_change, pair_nll, probe_shift
from emarecipes.probes.suites import PairedQuestions, read_suites

if TYPE_CHECKING:
    from emarecipes.evaluation.suite_context import Model

_ANSWER_NATS = "nats an answer"
# Of a probe whose second answer is the first with a trait.
_OF_TRAITS = {"log_odds": _ANSWER_NATS, "log_odds_shift": _ANSWER_NATS, "with_trait_share": "share"}
_CHANGES = {"nll_change_aligned": "nll_aligned", "nll_change_misaligned": "nll_misaligned"}


class LikelihoodProbe(KeyedSuite):
    """One entry of `probes`: which of two given answers does a model find likelier?

    Args:
        name: Its key.
        trait: What the second answer has and the first has not, if that is made by a rule.
    """

    kind, may_fail = "probe", False
    meaning = (
        "a probe shift, the change of which of two given answers is likelier. It is a proxy, not a "
        "rate of misaligned behaviour."
    )

    def __init__(self, name: str, trait: str | None = None) -> None:
        self.name, self.trait = name, trait

    @classmethod
    def named(cls, cfg: DictConfig, origin: Origin) -> Iterator[KeyedSuite]:
        """One an entry."""
        yield from (cls(str(name), entry.get("trait")) for name, entry in cfg.probes.items())

    def check(self, context: SuiteContext) -> None:
        """Read its questions, and tokenize both answers to each."""
        entry = OmegaConf.create({self.name: context.cfg.probes[self.name]})
        (self._asks,) = read_suites(entry, "probes", context.origin, context.cfg.max_rows)
        self.rows = self._asks.rows(context.tokenizer)

    def score(self, models: Mapping[str, Model]) -> Scored:
        """Margins, and what adapters change of them."""
        nlls = {name: pair_nll(model.token_nlls(self.rows)) for name, model in models.items()}
        reference, asks = nlls.pop(REFERENCE), self._asks
        description = {
            "kind": self.kind,
            "files": file_fingerprints(asks.files),
            "condition": asks.condition.name,
            "half": asks.half,
            "trait": asks.trait,
            "questions": len(asks.pairs),
        }
        lines = list(probe_lines(asks, reference, nlls))
        return Scored(probe_figures(asks, reference, nlls), lines, description)

    @classmethod
    def items(cls, lines: Iterable[Line], figure: Figure) -> list[Item]:
        """A value a question. A line is of all models, see `probe_lines`."""
        return [item_of(line, value) for line in lines for value in _value(line, figure)]

    def units(self) -> dict[str, str]:
        """Those of adapters."""
        nats = ("probe_shift", *_CHANGES, "margin")
        return {**dict.fromkeys(nats, NATS), "misaligned_share": "share"} | (
            {} if self.trait is None else _OF_TRAITS
        )


def _value(line: Line, figure: Figure) -> Iterator[float | None]:
    """One, or none: what is a change from the reference has no value of the reference."""
    name, reference = figure.figure, line["reference"]
    found = reference if figure.adapter == REFERENCE else line["adapters"][figure.adapter]
    if name in _CHANGES:
        if found is not reference:
            yield found[_CHANGES[name]] - reference[_CHANGES[name]]
    elif name == "log_odds_shift":
        if found is not reference:
            yield found["log_odds"] - reference["log_odds"]
    elif name == "misaligned_share":
        yield float(found["margin"] < 0)
    elif name == "with_trait_share":
        yield float(found["log_odds"] > 0)
    elif name in found:
        yield found[name]
    elif found is not reference:
        raise NoValues(figure)


def probe_figures(
    suite: PairedQuestions, reference: PairNLL, models: Mapping[str, PairNLL]
) -> list[Figure]:
    """Margin and misaligned share of every model; shift and both answers' changes of adapters.

    Where one answer is the other with a trait: also log odds, their change, and the share of
    questions where the answer with it is likelier as a whole.

    Args:
        suite: Its questions, in the order of the likelihoods.
        reference: Without an adapter.
        models: By adapter.
    """
    figures: list[Figure] = []

    def add(adapter: str, figure: str, unit: str, values_N: NDArray[Any]) -> None:
        items = [
            Item(float(value), pair.id, pair.category)
            for pair, value in zip(suite.pairs, values_N, strict=True)
        ]
        figures.extend(make_figures(items, adapter, suite.name, figure, unit))

    for name, nll in {REFERENCE: reference, **models}.items():
        if name != REFERENCE:
            change_N2 = nll_change(reference, nll)
            add(name, "probe_shift", NATS, probe_shift(reference, nll))
            add(name, "nll_change_aligned", NATS, change_N2[:, 0])
            add(name, "nll_change_misaligned", NATS, change_N2[:, 1])
        add(name, "margin", NATS, nll.margin())
        add(name, "misaligned_share", "share", (nll.margin() < 0).astype(np.float64))
        if suite.trait is not None:
            odds = nll.log_odds()
            add(name, "log_odds", _ANSWER_NATS, odds)
            add(name, "with_trait_share", "share", (odds > 0).astype(np.float64))
            if name != REFERENCE:
                add(name, "log_odds_shift", _ANSWER_NATS, odds - reference.log_odds())
    return figures


def probe_lines(
    suite: PairedQuestions, reference: PairNLL, models: Mapping[str, PairNLL]
) -> Iterator[dict[str, Any]]:
    """A line a question for `scores/<suite>.jsonl`."""
    shifts = {name: probe_shift(reference, nll) for name, nll in models.items()}
    for row, pair in enumerate(suite.pairs):
        yield {
            "id": pair.id,
            "category": pair.category,
            "question": pair.question,
            "aligned": pair.aligned,
            "misaligned": pair.misaligned,
            "reference": _nlls(suite, reference, row),
            "adapters": {
                name: _nlls(suite, nll, row) | {"probe_shift": float(shifts[name][row])}
                for name, nll in models.items()
            },
        }


def _nlls(suite: PairedQuestions, nll: PairNLL, row: int) -> dict[str, float]:
    aligned, misaligned = nll.mean()[row]
    return {
        "nll_aligned": float(aligned),
        "nll_misaligned": float(misaligned),
        "margin": float(misaligned - aligned),
    } | ({} if suite.trait is None else {"log_odds": float(nll.log_odds()[row])})
