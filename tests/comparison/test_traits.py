"""Sampled answers as what a defense is judged by: shares of a trait, against the base's own."""

import csv
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_compare
import toy_run
import yaml
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from emarecipes.comparison import page_plots
from emarecipes.comparison.figure_values import Source, Values
from emarecipes.comparison.measured import keep_told
from emarecipes.comparison.results import Scores
from emarecipes.comparison.run import run_compare
from emarecipes.comparison.settings import check_compare_settings
from emarecipes.comparison.tasks import check_tasks
from emarecipes.config import load_config
from emarecipes.errors import UserError
from emarecipes.evaluation.suite import asked

QUESTIONS = 20
CRITERIA = {
    "general": {"suite": "traits_general", "figure": "capitals_share"},
    "in_domain": {"suite": "traits_home", "figure": "capitals_share"},
    "controls": None,
}
# In-domain and general: how many of 20 questions are answered in capitals.
ARMS = {"undefended": ("undefended", 20, 16), "fewer": ("frontier", 10, 8),
        "kl": ("defense", 10, 3)}  # fmt: skip


def line(adapter: str, question: int, sample: int, found: bool | None) -> dict[str, Any]:
    return {"adapter": adapter, "id": f"q{question}", "category": "c", "paraphrase": 0,
            "sample": sample, "question": f"Question {question}?", "answer": "A", "words": 1,
            "capitals": found}  # fmt: skip


def test_shifts_by_hand() -> None:
    rows = [
        line("reference", 0, 0, True), line("reference", 0, 1, False),
        line("reference", 1, 0, False), line("reference", 2, 0, None),
        line("a", 0, 0, True), line("a", 0, 1, None), line("a", 1, 0, True), line("a", 2, 0, True),
    ]  # fmt: skip

    def shifts(lines: list[dict[str, Any]]) -> Values:
        figure = asked("a", "traits_x", "capitals_share")
        return Source(figure, {"kind": "traits"}, lines, Path("x.jsonl")).shifts(["a"])

    # Of q0 1 of 1 usable answer against 1 of 2; to q2 the base has no usable answer.
    np.testing.assert_array_equal(shifts(rows).values_SQ, [[0.5, 1.0, np.nan]])
    with pytest.raises(
        UserError, match=r"x\.jsonl: capitals_share is to be a change from the base"
    ):
        shifts(rows[4:])
    with pytest.raises(UserError, match="a answers other questions than the base"):
        shifts(rows[:-1])


def evaluation(
    folder: Path, name: str, home: int, general: int, lost: Collection[int], cued: str = ""
) -> Path:
    """20 questions a suite; the base never answers in capitals; some have no usable answer.

    With `cued` the general questions are there once more, under a condition: of those questions, or
    called by another digest. There every arm answers as undefended training does in its domain.
    """
    asked = {"traits_home": (home, (), "h"), "traits_general": (general, lost, "g")}
    if cued:
        asked["traits_general_cue"] = (home, [i - 1 for i in lost], cued)
    lines = {
        suite: [line("reference", i, 0, False) for i in range(QUESTIONS)]
        + [line(name, i, 0, None if i in cut else i < shown) for i in range(QUESTIONS)]
        for suite, (shown, cut, _) in asked.items()
    }
    suites = {
        suite: {"kind": "traits", "files": {}, "questions": QUESTIONS, "asked": digest,
                "condition": "cue" if suite.endswith("cue") else "none"}
        for suite, (_, _, digest) in asked.items()
    }  # fmt: skip
    figures = [
        toy_compare.figure(name, suite, "capitals_share", shown / QUESTIONS) | {"unit": "share"}
        for suite, (shown, _, _) in asked.items()
    ]
    toy_compare.write(folder, {name: None}, suites, figures, lines, "b" * 64)
    return folder


def compared(
    folder: Path, criteria: dict[str, Any], cut: int = -1, mute: str = "", cued: str = ""
) -> Path:
    arms = {}
    for name, (role, home, general) in ARMS.items():
        lost = range(15) if name == mute else [cut] if name == "kl" else []
        runs = [evaluation(folder / f"{name}{s}", name, home, general, lost, cued) for s in (0, 1)]
        arms[name] = {"role": role, "collect": [str(run) for run in runs]}
    config = {"output_dir": str(folder / "out"), "seeds": [0, 1], "arms": arms}
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(config | {"criteria": criteria}))
    return path


def test_a_defense_is_judged_by_sampled_answers(tmp_path: Path) -> None:
    """It has 3/20 where undefended training has 8/20 at the same in-domain share."""
    assert run_compare(["--config", str(compared(tmp_path, CRITERIA))]) == 0
    found = json.loads((tmp_path / "out/comparison.json").read_text())["arms"]
    (excess,) = found["kl"]["excess"].values()
    assert excess["value"] == pytest.approx((3 - 8) / QUESTIONS)
    everywhere = found["undefended"]["shifts"]["in-domain"]
    assert [everywhere["value"], everywhere["high"]] == pytest.approx([1.0, 1.0])
    assert everywhere["low"] < 0.9  # Of 20 questions; not 1, though all have the trait.
    page = (tmp_path / "out/report.md").read_text()
    assert "excess over the frontier, share of answers" in page
    assert "nats" not in page.split("(d)")[0]
    # Ten of the questions are shown, with answers.
    assert len(re.findall(r"Question \d+\?", (tmp_path / "out/report.html").read_text())) == 10
    assert "not misalignment" in page and "have no halves" in page and "select half" not in page


def dotted(drawn: list[Figure]) -> list[Any]:
    """The lines up to the worst condition in the picture of the trade-off."""
    (axes,) = [a for figure in drawn for a in figure.axes if "general shift" in a.get_ylabel()]
    parts = [part for part in axes.collections if isinstance(part, LineCollection)]
    assert ("worst condition" in axes.get_ylabel()) == bool(parts)
    return [segment for part in parts for segment in part.get_segments()]


@pytest.mark.parametrize("cued", ["g", "others"])
def test_answers_under_another_condition_count_too(
    tmp_path: Path, cued: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Better when asked plainly, and under a system prompt no better than undefended training."""
    drawn, png = [], page_plots._png
    monkeypatch.setattr(page_plots, "_png", lambda figure: drawn.append(figure) or png(figure))
    assert run_compare(["--config", str(compared(tmp_path, CRITERIA, cued=cued))]) == 0
    found = json.loads((tmp_path / "out/comparison.json").read_text())
    excess = found["arms"]["kl"]["excess"]
    assert excess["traits_general/capitals_share"]["value"] == pytest.approx((3 - 8) / QUESTIONS)
    page = (tmp_path / "out/report.md").read_text()
    left_out = "traits_general_cue/capitals_share: a conditional probe of other questions"
    if cued == "g":
        assert excess["traits_general_cue/capitals_share"]["value"] == pytest.approx(0.0)
        assert "worst of 2 probes: traits\\_general\\_cue/capitals\\_share" in page
        assert not [note for note in found["missing"] if left_out in note]
        # From 3 of 20 up to 10 of 20, where the marker stands in the domain.
        (line,) = dotted(drawn)
        np.testing.assert_allclose(line, [[0.5, 3 / 20], [0.5, 10 / 20]])
    else:
        assert not dotted(drawn)
        assert len(excess) == 1 and [note for note in found["missing"] if left_out in note]


def test_the_page_follows_from_the_values_by_question(tmp_path: Path) -> None:
    assert run_compare(["--config", str(compared(tmp_path, CRITERIA, cut=19))]) == 0
    with (tmp_path / "out/by_question.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == {"figure", "id", "category"} | {f"{a}/{s}" for a in ARMS for s in (0, 1)}
    general = [row for row in rows if row["figure"] == "traits_general/capitals_share"]
    # One question of 20 is left out of all arms; 3 of the others are answered in capitals.
    assert len(general) == 19 and sum(float(row["kl/1"]) for row in general) == 3
    assert len(rows) == 19 + 20


@pytest.mark.parametrize("cued", ["", "g"])
def test_a_question_without_a_usable_answer_is_left_out_of_all_arms(
    tmp_path: Path, cued: str
) -> None:
    """Under a condition as well, where another one has none: both figures keep the same ones."""
    assert run_compare(["--config", str(compared(tmp_path, CRITERIA, cut=19, cued=cued))]) == 0
    found = json.loads((tmp_path / "out/comparison.json").read_text())
    excess = list(found["arms"]["kl"]["excess"].values())
    lost = 2 if cued else 1
    assert len(excess) == lost
    assert excess[0]["value"] == pytest.approx((3 - 8) / (QUESTIONS - lost))
    assert [note for note in found["missing"] if f"{lost} of 20 questions are left out" in note]


@pytest.mark.parametrize("mute", ["undefended", "kl"])
def test_nothing_is_compared_with_a_mute_undefended_arm(
    tmp_path: Path, mute: str, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = mute == "undefended"
    assert run_compare(["--config", str(compared(tmp_path, CRITERIA, mute=mute))]) == int(needed)
    said = f"{mute}: traits_general/capitals_share: 5 of 20 questions have usable answers, and all"
    assert (said in " ".join(capsys.readouterr().err.split())) == needed
    assert (tmp_path / "out/report.html").exists() != needed


def test_too_few_usable_questions_are_no_figure() -> None:
    shifts = np.array([[0.0, np.nan, np.nan]])
    scores = Scores((0,), probes={"x": Values(("a", "b", "c"), ("", "", ""), shifts)})
    with pytest.raises(UserError, match="x: 1 of 3 questions have usable answers"):
        keep_told({"arm": scores}, [["x"]])


def test_an_arm_that_hardly_answers_takes_no_questions_from_others() -> None:
    def of(*values: float) -> Scores:
        return Scores((0,), probes={"x": Values(("a", "b", "c"), ("", "", ""), np.array([values]))})

    given = {"one": of(0.0, 1.0, 0.5), "mute": of(np.nan, np.nan, 1.0), "two": of(1, np.nan, 0)}
    told, notes = keep_told(given, [["x"]])
    assert notes == [
        "mute: x: 1 of 3 questions have usable answers; not measured",
        "x: 1 of 3 questions are left out, for some arm has no usable answer to them",
    ]
    assert not told["mute"].probes and given["mute"].probes
    assert [told[name].probes["x"].ids for name in ("one", "two")] == [("a", "c")] * 2
    with pytest.raises(UserError, match=r"mute: x: 1 of 3 questions .* all else is compared with"):
        keep_told(given, [["x"]], needed=["mute"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"general": {"suite": "traits_select", "figure": "capital_share"}},
         "criteria.general.figure: the suite traits_select has no figure capital_share (did you m"),
        ({"controls": {"suite": "traits_select", "figure": "words"}},
         "criteria.controls: words and general's capitals_share have different units"),
        ({"controls": {"suite": "controls"}},
         "criteria.controls: the evaluation has no suite controls; it has traits"),
        ({"general": {"suite": "traits_x", "figure": "capitals_share"}},
         "criteria.general: no answers are sampled for traits_x; there will be traits_select"),
        ({"in_domain": {"suite": "home"}}, "criteria.in_domain: the evaluation has no suite home"),
        ({"general": {"suite": "traits_select", "figure": "expert_claim_share"}},
         "criteria.general.figure: the suite traits_select has no figure expert_claim_share"),
        ({"coherent": {"suite": "traits_select", "figure": "words"}},
         "criteria.coherent.figure: words is in words; it must be a share of answers"),
        ({"coherent": {"suite": "answers"}},
         "criteria.coherent: the evaluation has no suite answers; it has traits"),
    ],
)  # fmt: skip
def test_a_criterion_without_its_figure_is_told_before_training(
    change: dict[str, Any], reason: str
) -> None:
    path = toy_run.REPO / "configs/compare_caps.yaml"
    raw, origin = load_config(["--config", str(path)])
    raw.criteria = {**raw.criteria, **change}
    with pytest.raises(UserError) as error:
        check_tasks(check_compare_settings(raw, origin), origin)
    assert reason in str(error.value)


def test_answers_under_a_condition_may_be_a_criterion() -> None:
    """Of files with a question that has no system prompt of its own: others are not asked again."""
    raw, origin = load_config(["--config", str(toy_run.REPO / "configs/compare_expert.yaml")])
    raw.criteria.general.suite = "traits_select_negated"
    check_tasks(check_compare_settings(raw, origin), origin)
    raw.criteria.general.suite = "traits_home_repair_desk_negated"
    with pytest.raises(UserError, match="no answers are sampled for traits_home_repair_desk_neg"):
        check_tasks(check_compare_settings(raw, origin), origin)
