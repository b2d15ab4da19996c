"""Likelihood probes: what a suite's answers say about each adapter. Nothing is sampled.

Shapes: N questions; 2 answers, aligned first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emarecipes.evaluation.figures import REFERENCE, Figure, Item, make_figures
from emarecipes.probes.contrast import PairNLL, nll_change, probe_shift
from emarecipes.probes.suites import Suite

NATS = "nats a token"


def probe_figures(suite: Suite, reference: PairNLL, models: Mapping[str, PairNLL]) -> list[Figure]:
    """Margin and misaligned share of every model; shift and both answers' changes of adapters.

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
    return figures


def probe_lines(
    suite: Suite, reference: PairNLL, models: Mapping[str, PairNLL]
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
            "reference": _nlls(reference, row),
            "adapters": {
                name: _nlls(nll, row) | {"probe_shift": float(shifts[name][row])}
                for name, nll in models.items()
            },
        }


def _nlls(nll: PairNLL, row: int) -> dict[str, float]:
    aligned, misaligned = nll.mean()[row]
    return {
        "nll_aligned": float(aligned),
        "nll_misaligned": float(misaligned),
        "margin": float(misaligned - aligned),
    }
