"""lm-evaluation-harness: what it found as our figures, and one clear line where it is missing."""

import importlib.util
from importlib.util import find_spec
from pathlib import Path

import pytest
import toy_run

from emarecipes.evaluation.harness import harness_figures, harness_lines, harness_suites
from emarecipes.evaluation.run import run_eval

FOUND = {
    "results": {
        "choice": {"alias": "choice", "acc,none": 0.75, "acc_stderr,none": 0.25},
        "open": {"exact_match,strict": 0.5, "exact_match_stderr,strict": "N/A", "alias": "open"},
    },
    "n-samples": {"choice": {"original": 9, "effective": 4}},
}


def test_figures_have_the_harness_own_errors() -> None:
    acc, match = harness_figures("kl", FOUND)
    assert (acc.adapter, acc.suite, acc.figure, acc.value) == ("kl", "harness_choice", "acc", 0.75)
    assert (acc.n, acc.questions) == (4, 4)
    assert acc.low == pytest.approx(0.75 - 1.96 * 0.25, abs=1e-5)
    assert acc.high == pytest.approx(0.75 + 1.96 * 0.25, abs=1e-5)
    assert (match.suite, match.figure) == ("harness_open", "exact_match (strict)")
    assert (match.value, match.low, match.high, match.n) == (0.5, None, None, 0)


def test_a_group_has_as_many_questions_as_its_tasks() -> None:
    """A group of a task and a group, which share a task."""
    found = {
        "results": {
            "all": {"acc,none": 0.6, "acc_stderr,none": 0.1, "alias": "all"},
            "nested": {"alias": "nested"},  # Without metrics of its own.
            "a": {"acc,none": 0.5},
            "b": {"acc,none": 0.75},
        },
        "n-samples": {"a": {"effective": 6}, "b": {"effective": 4}},
        "group_subtasks": {"all": ["a", "nested"], "nested": ["a", "b"]},
        "versions": {"all": 2, "a": 1, "b": 1},
    }
    figures = {figure.suite: figure for figure in harness_figures("kl", found)}
    assert {name: figure.n for name, figure in figures.items()} == {
        "harness_all": 10, "harness_a": 6, "harness_b": 4,
    }  # fmt: skip
    suites = dict(harness_suites(found))
    assert list(suites) == list(figures)
    assert suites["harness_all"] == {
        "kind": "harness", "files": {}, "version": 2, "questions": 10, "tasks": ["a", "b"],
    }  # fmt: skip
    assert "tasks" not in suites["harness_a"]


def test_lines_keep_what_was_asked_and_answered() -> None:
    sample = {"doc_id": 3, "filter": "strict", "target": 1,
              "arguments": [("Q?", " yes"), ("Q?", " no")],
              "filtered_resps": [(-4.5, False), (-2.0, False)], "metrics": ["acc"], "acc": 1.0,
              "doc_hash": "x"}  # fmt: skip
    (line,) = harness_lines("kl", [sample])
    assert line == {"adapter": "kl", "id": "3", "filter": "strict", "question": "Q?",
                    "target": "1", "acc": 1.0,
                    "responses": ["(-4.5, False)", "(-2.0, False)"]}  # fmt: skip


def test_without_lm_eval_one_line_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find_spec(name)
    )
    config = toy_run.REPO / "configs/smollm2_135m_eval.yaml"
    overrides = ["harness.tasks=[arc_easy]", "adapters={}", f"output_dir={tmp_path / 'out'}"]
    assert run_eval(["--config", str(config), *overrides]) == 1
    (line,) = [s for s in capsys.readouterr().err.splitlines() if s.startswith("error: ")]
    assert line.endswith("needs lm_eval, which is not installed: pip install lm-eval")
    assert not (tmp_path / "out").exists()
