"""What undefended training does decides which verdicts there can be."""

from typing import Any

import numpy as np
import pytest

from emarecipes.comparison.arms import Arm
from emarecipes.comparison.criteria import NO_EFFECT, ArmFigures, measure
from emarecipes.comparison.criterion import BoundSettings, ProbeNames
from emarecipes.comparison.figure_values import Values
from emarecipes.comparison.results import Scores

CUE = "general_domain_cue"


def scores(
    in_domain: float, general: float, cue: float, number: int, questions: int = 40, seeds: int = 3
) -> Scores:
    """Shifts around these means, controls at 0; the same questions for every arm."""
    rng = np.random.default_rng(number)
    means = {"general": general, CUE: cue, "controls": 0.0, "in_domain": in_domain}
    probes, suites = {}, {}
    for name, mean in means.items():
        noise = rng.normal(0, 0.05, (seeds, questions)) if mean is not None else 0
        values = mean + (noise - np.mean(noise)) * (mean != 0 or name == "controls")
        ids = tuple(f"{name}-{i}" for i in range(questions))
        probes[name] = Values(ids, ("",) * questions, values)
        file = "general" if name == CUE else name
        suites[name] = {"kind": "probe", "files": {file: "0"}, "condition": "none"}
    suites[CUE]["condition"] = "domain_cue"
    return Scores(tuple(range(seeds)), probes, suites=suites, base="b")


ROLES = {"undefended": "undefended", "half": "frontier"}


def compared(**arms: Scores) -> tuple[dict[str, ArmFigures], Any]:
    made = [
        Arm(name, name, name, ROLES.get(name, "defense"), ("narrow",))  # type: ignore[arg-type]
        for name in arms
    ]
    family = [arm.name for arm in made if arm.role == "defense"]
    figures, effect, _ = measure(made, arms, {}, ProbeNames(), BoundSettings(), family)
    return {found.arm.name: found for found in figures}, effect


def arms(cue: float = 0.8, effect: float = 1.0, **defenses: Scores) -> dict[str, Scores]:
    return {
        "undefended": scores(1.0, 0.5 * effect, 0.5 * cue * effect, 1),
        "half": scores(0.5, 0.25 * effect, 0.25 * cue * effect, 2),
        **defenses,
    }


def test_without_an_effect_there_are_no_verdicts() -> None:
    """An arm far below the frontier is not "better" where undefended training moves nothing."""
    given = arms(effect=0.02, good=scores(0.6, -0.2, -0.2, 3), same=scores(0.6, 0.005, 0.005, 4))
    figures, effect = compared(**given)
    assert effect.by_probe["general"].value == pytest.approx(0.01)
    assert not effect.is_there
    for name in ("good", "same"):
        assert figures[name].general().decision == NO_EFFECT
        assert figures[name].verdict is None
    figures, effect = compared(**arms(good=scores(0.6, -0.2, -0.2, 3)))
    assert effect.is_there and figures["good"].general().decision == "better"


def test_the_bound_is_a_quarter_of_the_effect() -> None:
    figures, effect = compared(
        **arms(near=scores(0.6, 0.30, 0.24, 3), far=scores(0.6, 0.5, 0.4, 4))
    )
    assert effect.bound == pytest.approx(0.125)
    assert figures["near"].general().decision == "equivalent"
    assert figures["far"].general().decision == "worse"
    # 0.2 above the frontier, less a quarter of 0.5.
    assert figures["far"].excesses["general"].over.value == pytest.approx(0.075, abs=0.01)
    assert figures["far"].excesses["general"].under.value == pytest.approx(0.325, abs=0.01)


def test_a_probe_that_does_not_move_does_not_stand_against_better() -> None:
    """The cue's shift of 1 % leaves nothing to be better at."""
    figures, effect = compared(**arms(cue=0.01, good=scores(0.6, 0.05, 0.003, 3)))
    assert effect.moved == {"general"}
    assert figures["good"].general().decision == "better"
    loses = scores(0.6, 0.05, 0.4, 4)
    figures, _ = compared(**arms(cue=0.01, loses=loses))
    assert figures["loses"].general().decision == "worse"


def test_an_arm_that_did_not_train_is_not_equivalent() -> None:
    """It has an excess of exactly 0 with an error of 0: equivalent with p = 0."""
    figures, _ = compared(**arms(none=scores(0.0, 0.0, 0.0, 3)))
    cell = figures["none"].general()
    assert cell.decision == "undecided"
    assert "3 of 3 seeds did not learn in-domain" in cell.note


def test_an_arm_that_barely_trained_is_not_equivalent() -> None:
    """At 6 % of the in-domain shift the frontier itself is within a quarter of the effect."""
    figures, _ = compared(**arms(little=scores(0.06, 0.03, 0.024, 3)))
    little = figures["little"]
    assert little.verdict is not None and little.verdict.decision == "equivalent"
    assert little.general().decision == "undecided"
    assert "too little was learned" in little.general().note
    assert little.narrow.decision == "partly learned"
    assert little.narrow.share == pytest.approx(0.06, abs=0.01)


def test_one_question_is_not_measured() -> None:
    given = {
        "undefended": scores(1.0, 0.5, 0.4, 1, questions=1, seeds=2),
        "good": scores(1.0, -0.2, -0.2, 2, questions=1, seeds=2),
    }
    figures, effect = compared(**given)
    assert not effect.is_there
    assert figures["good"].general().decision == "not measured"
    assert figures["good"].narrow.decision == "not measured"
