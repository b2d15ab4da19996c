"""Questions that every arm has usable answers to: what a criterion of sampled answers is over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from emarecipes.comparison.results import Scores
from emarecipes.errors import UserError

# Of the questions, at least so many must have usable answers under every arm.
MIN_TOLD = 0.5


def keep_told(
    arms: Mapping[str, Scores], keys: Sequence[str]
) -> tuple[dict[str, Scores], list[str]]:
    """The arms' scores over the questions that have usable answers under every arm and seed.

    Args:
        arms: By name.
        keys: Of `Scores.probes`.

    Returns:
        The scores, and a line for each figure that lost questions.

    Raises:
        UserError: Fewer than half of the questions are left: what is over them is not what was
            asked.
    """
    kept, notes = dict(arms), []
    for key in keys:
        having = [name for name, scores in arms.items() if key in scores.probes]
        if not having:
            continue
        ids = kept[having[0]].probes[key].ids
        same = [name for name in having if kept[name].probes[key].ids == ids]
        told_Q = np.all(
            [np.isfinite(kept[name].probes[key].values_SQ).all(axis=0) for name in same], axis=0
        )
        if told_Q.mean() < MIN_TOLD:
            raise UserError(
                f"{key}: {told_Q.sum()} of {len(ids)} questions have usable answers under every "
                "arm and seed; sample more answers, or longer ones"
            )
        if told_Q.all():
            continue
        notes.append(
            f"{key}: {(~told_Q).sum()} of {len(ids)} questions are left out, for some arm has no "
            "usable answer to them"
        )
        places = np.flatnonzero(told_Q)
        for name in same:
            values = kept[name].probes[key]
            part = replace(
                values,
                ids=tuple(ids[i] for i in places),
                categories=tuple(values.categories[i] for i in places),
                values_SQ=values.values_SQ[:, places],
            )
            kept[name] = replace(kept[name], probes=kept[name].probes | {key: part})
    return kept, notes
