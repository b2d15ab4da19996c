"""What a comparison's report says of its design: what its figures are differences of."""

from __future__ import annotations

from emarecipes.comparison.outcome import Outcome


def estimand(outcome: Outcome) -> list[str]:
    """What is compared where it is no plain shift: differences of pairs of runs."""
    if not outcome.paired:
        return []
    less = f", less {outcome.settings.probes.controls}" if outcome.effect.controls else ""
    text = (
        "Every figure of (a) and (b) is a difference by question and seed: the run on bad answers "
        "minus the run on good answers to the same questions, under the same defense. (a) is "
        f"general{less}, against the same difference of undefended training at an equal in-domain "
        "difference."
    )
    return [text]
