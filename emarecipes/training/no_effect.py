"""What a defense without a gradient of its own is seen to do; that it does nothing is told."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from torchtune import utils

from emarecipes.defenses import Defense
from emarecipes.training.gradients import FIRST_RATIO

log = utils.get_logger("INFO")

_LEAST = 1e-4


def tell_no_effect(
    step: int,
    total_steps: int,
    defenses: Mapping[str, Defense],
    figures: Mapping[str, float],
    first: Mapping[str, float],
) -> None:
    """Warn in step 10, or the last of a shorter run, of what has changed next to nothing till then.

    That is a defense whose `effect_figure` is below 1e-4, and an objective that equals cross
    entropy to six digits: its tokens all weigh the same, say. (`Gradients.ratios` tells of terms
    without a gradient.)

    Args:
        step: From 1.
        total_steps: The run's.
        defenses: By name.
        figures: The step's.
        first: Each figure when it was first logged; a schedule may have ended since.
    """
    if step != min(FIRST_RATIO, total_steps):
        return
    told = []
    for name, defense in defenses.items():
        key = f"{name}_{defense.effect_figure}"
        if key in figures:
            size = max(figures[key], first.get(key, 0.0))
            if not size >= _LEAST:
                told.append(
                    f"{key} is {size:.1g}: defenses.{name} changes what it acts on by that share "
                    "of its size, which is next to nothing"
                )
        ce = figures.get("ce", math.nan)
        replaces = defense.is_objective and defense.weight > 0
        if replaces and math.isclose(figures.get(name, math.nan), ce, rel_tol=1e-6):
            told.append(
                f"defenses.{name} takes the place of cross entropy and is equal to it ({ce:.6g}): "
                "with these settings, on these rows, it changes nothing"
            )
    for line in told:
        utils.log_rank_zero(log, f"step {step}: {line}", level=logging.WARNING)
