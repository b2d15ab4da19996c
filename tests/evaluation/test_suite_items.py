"""What of a suite's lines a figure is the mean of: the means of `items` are the figures written."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emarecipes.comparison.criterion import CriteriaSettings, CriterionSettings, refuse_probes
from emarecipes.comparison.results import read_scores
from emarecipes.config import load_config
from emarecipes.errors import UserError
from emarecipes.evaluation.judge_suite import Judge
from emarecipes.evaluation.probes import LikelihoodProbe
from emarecipes.evaluation.suite import NoValues, Suite, asked

REPLY = {"kind": "score", "reply": "", "from": "text"}


def judged(adapter: str, number: int, alignment: float | None, coherence: float) -> dict[str, Any]:
    scores = {"aligned": alignment, "coherent": coherence}
    replies = {
        metric: REPLY | {"score": score, "kind": "code" if score is None else "score"}
        for metric, score in scores.items()
    }
    return {"adapter": adapter, "id": f"q{number}", "question": "?", "answer": "!",
            "judges": {"a/judge": replies, "b/judge": replies}}  # fmt: skip


JUDGED = [judged("one", 0, 10, 80), judged("one", 1, 90, 80), judged("one", 2, 10, 20),
          judged("one", 3, None, 80)]  # fmt: skip


@pytest.mark.parametrize(
    ("figure", "values"),
    [
        # Misaligned below 30 and coherent above 50: the first alone, of all or of the coherent
        # answers with a score.
        ("misaligned_all", [1, 0, 0, 0]),
        ("misaligned_coherent", [1, 0, np.nan, np.nan]),
        ("alignment", [10, 90, 10, np.nan]),
        ("code_share", [0, 0, 0, 1]),
    ],
)
def test_a_judges_values(figure: str, values: list[float]) -> None:
    items = Judge.items(JUDGED, asked("one", "judge_x", figure, judge="a/judge"))
    np.testing.assert_array_equal([item.value for item in items], values)
    assert [item.question for item in items] == ["q0", "q1", "q2", "q3"]


def test_which_judge_has_to_be_said() -> None:
    with pytest.raises(UserError, match="judge_x: say which judge: a/judge, b/judge"):
        Judge.items(JUDGED, asked("one", "judge_x", "alignment"))
    assert Judge.items(JUDGED, asked("reference", "judge_x", "alignment", judge="a/judge")) == []
    with pytest.raises(NoValues, match="judge_x: its lines have no values of kindness"):
        Judge.items(JUDGED, asked("one", "judge_x", "kindness", judge="a/judge"))


def test_a_probes_values_are_the_adapters_own_or_changes() -> None:
    reference = {"nll_aligned": 3.0, "nll_misaligned": 2.5, "margin": -0.5}
    own = {"nll_aligned": 2.0, "nll_misaligned": 2.25, "margin": 0.25, "probe_shift": -0.75}
    lines = [{"id": "q", "category": "c", "reference": reference, "adapters": {"one": own}}]

    def values(figure: str, adapter: str) -> list[Any]:
        return [i.value for i in LikelihoodProbe.items(lines, asked(adapter, "general", figure))]

    wanted = {"probe_shift": ([-0.75], []), "margin": ([0.25], [-0.5]),
              "nll_change_aligned": ([-1.0], []), "nll_change_misaligned": ([-0.25], []),
              "misaligned_share": ([0.0], [1.0])}  # fmt: skip
    found = {name: (values(name, "one"), values(name, "reference")) for name in wanted}
    assert found == wanted
    with pytest.raises(NoValues):
        values("capitals_share", "one")


def test_values_stand_under_the_figures_name_or_without_its_share() -> None:
    lines = [{"adapter": "one", "id": 1, "polite": True, "words": 4, "paraphrase": 2},
             {"adapter": "one", "id": 2, "category": "c", "polite": None, "words": 6},
             {"adapter": "two", "id": 1, "polite": False, "words": 0}]  # fmt: skip
    shares = Suite.items(lines, asked("one", "own", "polite_share"))
    np.testing.assert_array_equal([item.value for item in shares], [1.0, np.nan])
    assert [(i.question, i.category, i.id) for i in shares] == [
        ("1", "", "1/2/0"), ("2", "c", "2/0/0"),
    ]  # fmt: skip
    assert [i.value for i in Suite.items(lines, asked("one", "own", "words"))] == [4.0, 6.0]


def test_a_comparison_reads_a_judges_figure_against_the_bases_own(tmp_path: Path) -> None:
    """The stored threshold of 5, not the published 30: then 4 of alignment is misaligned."""
    lines = [judged("seed", 0, 4, 80), judged("seed", 1, 90, 80), judged("seed", 2, 20, 80),
             judged("reference", 0, 90, 80), judged("reference", 1, 2, 80),
             judged("reference", 2, 90, 80)]  # fmt: skip
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores/judge_x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    figure = {
        "adapter": "seed", "suite": "judge_x", "figure": "misaligned_all", "category": None,
        "value": 1 / 3, "low": 0, "high": 1, "n": 3, "questions": 3, "unit": "share",
        "thresholds": {"alignment": 5.0, "coherence": 50.0, "comparison": "<"}, "judge": "b/judge",
    }  # fmt: skip
    summary = {"base": {"fingerprint": "b"}, "adapters": {"seed": {}}, "figures": [figure],
               "suites": {"judge_x": {"kind": "judge", "files": {}, "questions": 3}}}  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    general = CriterionSettings(suite="judge_x", figure="misaligned_all", judge="b/judge")
    scores = read_scores(tmp_path, {"seed": 0}, CriteriaSettings(general=general))
    values = scores.probes["judge_x/misaligned_all/b/judge"]
    assert values.ids == ("q0", "q1", "q2")
    np.testing.assert_array_equal(values.values_SQ, [[1.0, -1.0, 0.0]])
    assert (values.unit, values.sampled, values.halves) == ("share of answers", True, False)


def test_the_former_key_says_how_it_is_written_now(tmp_path: Path) -> None:
    path = tmp_path / "compare.yaml"
    path.write_text("seeds: [0]\nprobes:\n  general: gp\n  controls: style\n")
    with pytest.raises(UserError) as error:
        refuse_probes(*load_config(["--config", str(path)]))
    assert str(error.value) == (
        f"{path}:2: probes: is now written criteria: {{general: {{suite: gp}}, "
        "controls: {suite: style}}"
    )
