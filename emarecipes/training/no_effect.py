"""What a defense without a gradient of its own is seen to do; that it does nothing is told."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from torchtune import utils

from emarecipes.defenses import Defense
from emarecipes.defenses.base import TERMS
from emarecipes.training.gradients import FIRST_RATIO

log = utils.get_logger("INFO")

_LEAST = 1e-4


class EffectWatch:
    """Warns after step 10, or the last of a shorter run, of what did next to nothing till then.

    That is a defense whose `effect_figure` was below 1e-4 in every step, or is not logged; one that
    overrides `policy_forward` and has neither such a figure nor a term; and an
    objective that equalled cross entropy to six digits in every step, as its tokens all weigh the
    same, say. (`Gradients.ratios` tells of terms without a gradient.) A resumed run knows its
    figures of the first step and of its own.

    Args:
        defenses: By name.
    """

    def __init__(self, defenses: Mapping[str, Defense]) -> None:
        self._keys = {
            name: f"{name}_{defense.effect_figure}"
            for name, defense in defenses.items()
            if defense.effect_figure is not None
        }
        self._unseen = [
            name
            for name, d in defenses.items()
            if d.has("policy_forward") and d.effect_figure is None and not any(map(d.has, TERMS))
        ]
        self._objectives = [n for n, d in defenses.items() if d.is_objective and d.weight]
        self._largest: dict[str, float] = {}
        self._differ: dict[str, bool] = {}

    def see(
        self, step: int, figures: Mapping[str, float], first: Mapping[str, float], *, last: bool
    ) -> None:
        """Take a step's figures in, and warn where it is the one.

        Args:
            step: From 1.
            figures: The step's.
            first: Each figure when it was first logged.
            last: Whether the run ends with it.
        """
        if step > FIRST_RATIO:
            return
        for key in self._keys.values():
            found = [x[key] for x in (first, figures) if x.get(key, math.nan) >= 0]
            if found:
                self._largest[key] = max(self._largest.get(key, 0.0), *found)
        for name in self._objectives:
            if name in figures and "ce" in figures:
                same = math.isclose(figures[name], figures["ce"], rel_tol=1e-6)
                self._differ[name] = self._differ.get(name, False) or not same
        if step == FIRST_RATIO or last:
            for line in self._lines():
                utils.log_rank_zero(log, f"step {step}: {line}", level=logging.WARNING)

    def _lines(self) -> list[str]:
        lines = []
        for name, key in self._keys.items():
            if key not in self._largest:
                lines.append(
                    f"{key}, the effect_figure of defenses.{name}, was not logged: nothing shows "
                    "that it changes anything"
                )
            elif self._largest[key] < _LEAST:
                lines.append(
                    f"{key} is {self._largest[key]:.1g} at most: defenses.{name} changes what it "
                    "acts on by that share of its size, which is next to nothing"
                )
        for name in self._unseen:
            lines.append(
                f"defenses.{name} changes the policy's forward and names no effect_figure: nothing "
                "shows that it changes anything (docs/own_defense.md)"
            )
        for name, differs in self._differ.items():
            if not differs:
                lines.append(
                    f"defenses.{name} takes the place of cross entropy and is equal to it: with "
                    "these settings, on these rows, it changes nothing"
                )
        return lines
