"""What came of blind pairwise judgements: shares, orders of adapters, and intervals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

import numpy as np
from correlation import crossed_spearman
from pairwise import VERDICTS, Judged, Pair

from emarecipes.errors import UserError
from emarecipes.evaluation.statistics import (
    Floats,
    Interval,
    question_bootstrap,
    share_bootstrap,
)


def outcome(
    shifts: Mapping[str, Floats], pairs: Sequence[Pair], judged: Sequence[Judged], seed: int
) -> dict[str, Any]:
    """What the judgements say, for `judged.json`.

    `worse` of an adapter is the share of its pairs in which its answer is the worse one minus the
    share in which the reference's is; ties, and pairs of the same answer twice, are 0. A pair that
    is shown twice is the mean of both judgements. One that lacks a judgement (refused, unparsable,
    failed) is left out whole, for its other half would carry the judge's favourite place.

    Args:
        shifts: Probe shifts (N,) by adapter.
        pairs: From `read_evaluation`.
        judged: From `judge_pairs`.
        seed: Of the correlation's resampling.

    Raises:
        UserError: More than half of the judgements are unparsable; an adapter has no pair left, or
            pairs or shifts of one question only.
    """
    verdicts = Counter(one.verdict for one in judged)
    counts = {verdict: verdicts[verdict] for verdict in VERDICTS}
    if 2 * verdicts["unparsable"] > len(judged):
        raise UserError(
            f"most judgements are neither A, B nor tie, see judgements.jsonl: {counts}; a judge "
            "that thinks first needs more --max-tokens"
        )
    values = [(pair, 0.0) for pair in pairs if pair.same]
    for pair, shown in groupby(judged, key=lambda one: one.pair):
        values.append((pair, float(np.mean([one.value for one in shown]))))
    kept: dict[str, list[tuple[Pair, float]]] = {name: [] for name in shifts}
    for pair, value in values:
        if not math.isnan(value):
            kept[pair.adapter].append((pair, value))
    if lacking := [name for name, found in kept.items() if not found]:
        raise UserError(f"no usable judgement of {lacking[0]}, see judgements.jsonl: {counts}")
    for name, found in kept.items():
        if min(len({pair.key[0] for pair, _ in found}), len(shifts[name])) < 2:
            raise UserError(f"{name}: an interval needs two questions of the probe and of answers")
    shifts_KN = np.stack(list(shifts.values()))
    rho, undefined = crossed_spearman(shifts_KN, *_by_question(kept, pairs), seed=seed)
    asked = counts["A"] + counts["B"]
    return {
        "spearman": asdict(rho) | {"undefined_draws": undefined},
        "share_a": counts["A"] / asked if asked else None,
        "verdicts": counts,
        "same_answer": sum(pair.same for pair in pairs),
        "left_out": len(pairs) - sum(map(len, kept.values())),
        "adapters": [_adapter(name, shifts[name], found) for name, found in kept.items()],
    }


def _by_question(
    kept: Mapping[str, Sequence[tuple[Pair, float]]], pairs: Sequence[Pair]
) -> tuple[Floats, Floats]:
    """Sums of values and their numbers, (K, Q) each."""
    questions = dict.fromkeys(pair.key[0] for pair in pairs)
    place = {question: number for number, question in enumerate(questions)}
    sums_KQ, counts_KQ = np.zeros((2, len(kept), len(place)))
    for number, found in enumerate(kept.values()):
        for pair, value in found:
            sums_KQ[number, place[pair.key[0]]] += value
            counts_KQ[number, place[pair.key[0]]] += 1
    return sums_KQ, counts_KQ


def _adapter(name: str, shift_N: Floats, kept: Sequence[tuple[Pair, float]]) -> dict[str, Any]:
    questions = [pair.key[0] for pair, _ in kept]
    # From 0 to 1: then it has Wilson's interval where all pairs agree.
    half = share_bootstrap([(value + 1) / 2 for _, value in kept], questions)
    worse = Interval(*(2 * end - 1 for end in (half.estimate, half.low, half.high)))
    shift = question_bootstrap(shift_N)
    counts = {"pairs": len(kept), "questions": len(set(questions))}
    return {"adapter": name, "shift": asdict(shift), "worse": asdict(worse)} | counts
