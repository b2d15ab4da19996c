"""Every question's value under every arm and seed: what the page follows from."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping

from emarecipes.comparison.results import Scores

BY_QUESTION = "by_question.csv"


def by_question(arms: Mapping[str, Scores]) -> str:
    """CSV: a line a figure and question, a column an arm and seed, `ARM/SEED`.

    Values are shifts, as the criteria read them, of the questions that they read; empty where an
    arm lacks the figure or the question.

    Args:
        arms: Scores on the narrow task, by arm.
    """
    columns = [f"{arm}/{seed}" for arm, scores in arms.items() for seed in scores.seeds]
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for arm, scores in arms.items():
        for figure, values in scores.probes.items():
            for seed, row in zip(scores.seeds, values.values_SQ, strict=True):
                for name, category, value in zip(values.ids, values.categories, row, strict=True):
                    line = lines.setdefault((figure, name, category), {})
                    line[f"{arm}/{seed}"] = f"{value:.6g}"
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["figure", "id", "category", *columns])
    for key, found in lines.items():
        writer.writerow([*key, *(found.get(column, "") for column in columns)])
    return text.getvalue()
