"""Figures as they are written and shown."""

import json
from pathlib import Path

import pytest

from emarecipes.evaluation.figures import Item, make_figures, print_figures, write_summary


def test_a_category_of_one_question_has_no_interval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """100 answers to one question of category a, 30 of them hits; one to each of two of b."""
    items = [Item(float(i < 30), "q1", "a") for i in range(100)]
    items += [Item(1.0, "q2", "b"), Item(0.0, "q3", "b")]
    figures = make_figures(items, "one", "suite", "hits", "share")
    write_summary(tmp_path, {}, figures)
    text = (tmp_path / "summary.json").read_text()

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    whole, a, b = json.loads(text, parse_constant=refuse)["figures"]
    assert whole["low"] < whole["value"] < whole["high"]
    assert (a["value"], a["low"], a["high"], a["n"], a["questions"]) == (0.3, None, None, 100, 1)
    assert (b["value"], b["low"], b["high"]) == (0.5, 0.0, 1.0)

    print_figures(make_figures(items[:100], "one", "suite", "hits", "share"), tmp_path)
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "hits" in line]
    assert row.split() == ["one", "hits", "0.300", "-", "-", "100", "share"]
