"""Runs on bad answers minus runs on good answers to the same questions, by question and seed.

What any training on such questions moves, with its style and its noise by question, is in both and
goes; what is left is what bad answers teach. Shapes: S seeds, Q questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from emarecipes.comparison.arms import Arm
from emarecipes.comparison.criteria import unlike
from emarecipes.comparison.figure_values import Values
from emarecipes.comparison.results import Scores
from emarecipes.errors import UserError


def paired(bad: Scores, good: Scores) -> Scores:
    """The bad answers' scores with `probes` minus the good answers', (S, Q), of the seeds of both.

    Raises:
        UserError: No seed in common, or evaluations that do not compare.
    """
    reason = unlike(good, bad, list(bad.probes), "those on bad answers")
    if reason:
        raise UserError(reason)
    seeds = [seed for seed in bad.seeds if seed in good.seeds]
    if not seeds:
        raise UserError("no seed in common with its runs on good answers")
    rows = [bad.seeds.index(seed) for seed in seeds]
    others = [good.seeds.index(seed) for seed in seeds]

    def of(values: Values | None) -> Values | None:
        return None if values is None else values.of_seeds(rows)

    return replace(
        bad,
        seeds=tuple(seeds),
        probes={
            name: replace(
                values,
                values_SQ=values.values_SQ[rows] - good.probes[name].values_SQ[others],
            )
            for name, values in bad.probes.items()
        },
        correct=of(bad.correct),
        coherent=of(bad.coherent),
        figures=[bad.figures[row] for row in rows] if bad.figures else [],
        adapters=tuple(bad.adapters[row] for row in rows) if bad.adapters else (),
        paired=True,
    )


def pair_arms(
    arms: Sequence[Arm], bad: Mapping[str, Scores], good: Mapping[str, Scores]
) -> tuple[dict[str, Scores], list[str]]:
    """`paired` of every arm that has both, and a line for each that has not, or cannot be.

    Raises:
        UserError: The undefended arm cannot.
    """
    found, notes = {}, []
    for arm in arms:
        if arm.name not in bad:
            continue
        try:
            if arm.name not in good:
                raise UserError("its runs on good answers have no scores; not compared")
            found[arm.name] = paired(bad[arm.name], good[arm.name])
        except UserError as error:
            if arm.role == "undefended":
                raise UserError(f"{arm.label}: {error}") from None
            notes.append(f"{arm.label}: {error}")
    return found, notes
