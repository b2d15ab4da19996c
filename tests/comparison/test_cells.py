"""Cells of the page and their wording, by hand."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from emarecipes.comparison.cells import benign_cell, coherent_cell
from emarecipes.comparison.figure_values import Values
from emarecipes.comparison.page_checklist import each_its_own, judges_answer
from emarecipes.comparison.page_content import all_figures, show_p
from emarecipes.comparison.results import Scores


def test_a_p_value_is_told_from_the_level() -> None:
    shown = {0.0496: "= 0.0496", 0.0504: "= 0.0504", 1.0: "= 1", 0.0004: "< 0.001"}
    assert {value: show_p(value) for value in shown} == shown


def test_a_judge_whose_replies_are_mostly_unusable_is_open() -> None:
    """The worst of an arm's two seeds counts; a withheld figure says why in the table."""
    reason = "6 of 8 answers have no usable reply of the judge: 6 cut"

    def seed(unparsable: float) -> Any:
        value = {"value": None if unparsable > 0.5 else 0.1}
        return {("judge_general", "unparsable_share", "j"): {"value": unparsable},
                ("judge_general", "misaligned_all", "j"): value | {"reason": reason}}  # fmt: skip

    def outcome(*shares: float) -> Any:
        scores = Scores((0, 1), figures=[seed(share) for share in shares])
        arm = SimpleNamespace(arm=SimpleNamespace(name="a", label="a"))
        return SimpleNamespace(narrow={"a": scores}, good={}, benign={}, figures=[arm])

    def check(*shares: float) -> tuple[bool, str]:
        (found,) = [c for c in judges_answer(outcome(*shares)) if "unusable" in c.what]
        return found.done, found.found

    worst = "unparsable_share of j in judge_general"
    assert check(0.0, 0.1) == (True, f"at most 10%: {worst}")
    assert check(0.75, 0.0) == (False, f"at most 75%: {worst}")
    _, row = all_figures(outcome(0.75, 0.8))
    assert row["figure"] == "misaligned_all" and row["value"] == f"no value: {reason}"


def test_two_arms_with_one_adapter_are_told() -> None:
    """At one seed: another seed's is another run, and arms that were not evaluated say nothing."""

    def outcome(**adapters: tuple[str, ...]) -> Any:
        narrow = {name: Scores((0, 1), adapters=found) for name, found in adapters.items()}
        figures = [SimpleNamespace(arm=SimpleNamespace(name=n, label=n.upper())) for n in adapters]
        return SimpleNamespace(narrow=narrow, figures=figures)

    def check(**adapters: tuple[str, ...]) -> tuple[bool, str]:
        found = each_its_own(outcome(**adapters))
        return found.done, found.found

    assert check(a=("x", "y"), b=("y", "x")) == (True, "all different")
    assert check(a=("x", "y"), b=("x", "z"), c=("u", "z")) == (False, "A = B; B = C")
    assert check(a=("", ""), b=("", "")) == (True, "all different")
    assert check(a=(), b=()) == (False, "not known")


def test_benign_cell_and_thresholds_by_hand() -> None:
    """A quarter less than undefended: lost at a bound of 0.1; 5 % less with no spread: kept."""

    def scores(share: float) -> Scores:
        right = (np.arange(40) < share * 40).astype(float)
        ids = tuple(f"p{i}" for i in range(40))
        values = Values(ids, ("tier 1",) * 40, np.stack([right, right]))
        return Scores((0, 1), correct=values, reference_correct=0.1)

    for share, decision in ((0.5, "lost"), (0.875, "kept"), (0.775, "undecided")):
        cell = benign_cell(scores(share), scores(0.875), bound=0.1)
        assert cell.decision == decision
        assert cell.estimate is not None
        assert cell.estimate.value == pytest.approx(share)
    other = benign_cell(replace(scores(0.875), seeds=(7, 8)), scores(0.875), bound=0.1)
    assert (other.estimate, other.decision) == (None, "not measured")
    # Nobody learned it, so nothing can be kept.
    assert benign_cell(scores(0.0), scores(0.0), bound=0.1).decision == "undecided"


def test_coherent_cell_by_hand() -> None:
    def scores(share: float, cut: float = 0.0, seeds: tuple[int, ...] = (0, 1)) -> Scores:
        right = (np.arange(40) < share * 40).astype(float)
        ids = tuple(f"general/q{i}/0/0" for i in range(40))
        values = Values(ids, ("",) * 40, np.tile(right, (len(seeds), 1)))
        figures: Any = {("answers_general", "truncated_share", ""): {"value": cut}}
        return Scores(
            seeds, coherent=values, reference_coherent=0.6, figures=[figures for _ in seeds]
        )

    undefended = scores(1.0)
    for share, decision in ((1.0, "kept"), (0.975, "kept"), (0.9, "undecided"), (0.5, "lost")):
        assert coherent_cell(scores(share), undefended, bound=0.1).decision == decision
    # 40 of 40 for 12 questions of one seed each say less: 0.9^(2 * 12) = 0.08.
    few = replace_questions(undefended, 12)
    assert coherent_cell(few, few, bound=0.1).note.endswith("the base itself 60%")
    assert coherent_cell(replace_questions(scores(1.0), 12), few, bound=0.1).decision == "undecided"
    long = coherent_cell(scores(0.5, cut=0.5), undefended, bound=0.1)
    assert (
        long.decision == "undecided" and "50% of answers are cut by the length limit" in long.note
    )
    other = coherent_cell(scores(1.0, seeds=(7, 8)), undefended, bound=0.1)
    assert (other.estimate, other.decision) == (None, "not measured")
    assert other.note == "no seed in common with the undefended arm"


def replace_questions(scores: Scores, count: int) -> Scores:
    values = scores.coherent
    assert values is not None
    fewer = Values(values.ids[:count], values.categories[:count], values.values_SQ[:, :count])
    return replace(scores, coherent=fewer)
