"""What a comparison's report says of its design: what its figures are differences of."""

from __future__ import annotations

from emarecipes.comparison.cells import ALPHA
from emarecipes.comparison.looks import alpha_of
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


def looks(outcome: Outcome) -> list[str]:
    """Which look at the report half this is, and the error rate that it may spend."""
    first, look = outcome.first_look, outcome.settings.look
    if first is None or look is None:
        return []
    labels = {found.arm.name: found.arm.label for found in outcome.figures}
    decided = ", ".join(labels.get(name, name) for name in first.verdicts) or "nothing"
    needs = f"a verdict here needs a Holm-corrected p below {alpha_of(look):.4f}"
    if look == 1:
        text = (
            f"First of two looks, at {first.questions} general questions: {needs}. It decided: "
            f"{decided}. What it left open is decided at the second (looks.at=2), below "
            f"{alpha_of(2):.4f}; together they are {ALPHA:g} (O'Brien and Fleming's spending)."
        )
    else:
        text = (
            f"Second of two looks: {needs}. The first, on {first.taken} at {first.questions} "
            f"general questions, was at {alpha_of(1):.4f} and decided, for good: {decided}. "
            f"Together they are {ALPHA:g} (O'Brien and Fleming's spending)."
        )
    return [f"{text} Intervals are of this look alone, at 95 %."]
