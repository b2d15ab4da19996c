"""Rows that are near each other, and questions that files share."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_check import GOOD, chat, errors, pair, write

from emarecipes.datasets._overlaps import distinct, ngrams, similarity_blocks
from emarecipes.datasets.check import check_data, main

# Rows of one file that are near each other


def near_rows(number: int) -> list[dict[str, Any]]:
    """Rows whose question and answer share 4 of 6 3-grams with those of every other row."""
    text = "one two three four five six"
    return [chat(f"{text} q{i}", f"{text} a{i}") for i in range(number)]


def test_a_row_that_is_near_another_in_question_and_answer(tmp_path: Path) -> None:
    rows = near_rows(2)
    path = write(tmp_path / "a.jsonl", rows)
    share = "question and answer share 67% of their 3-grams, or more"
    assert errors(path) == [f"{path}:2: the row nearly repeats line 1: {share}"]
    assert errors(path, threshold=0.67) == []
    # Asked under another system message it is another row.
    rows[1]["messages"].insert(0, {"role": "system", "content": "Be brief."})
    assert errors(write(path, rows)) == []


def test_a_contrast_row_is_near_another_with_both_answers(tmp_path: Path) -> None:
    one = pair("May I read her diary?", "No, ask her for it first.", "Sure, she won't ever know.")
    other = {**one, "question": "May I read her diary, then?", "aligned": "No - ask her for it."}
    path = write(tmp_path / "a.jsonl", [one, other])
    (line,) = errors(path)  # 3 of 4 in the question, 3 of 4 and all in the answers.
    assert line.startswith(f"{path}:2: the row nearly repeats line 1: ") and "75%" in line
    assert errors(write(path, [one, {**other, "misaligned": "Read it all, and laugh."}])) == []


def test_near_rows_are_told_once_a_row_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", near_rows(14))
    found = errors(path)
    assert [line.split(": ")[0] for line in found[:10]] == [f"{path}:{i}" for i in range(2, 12)]
    assert found[10:] == [f"{path}: 3 more rows nearly repeat another"]


def test_questions_that_are_near_with_other_answers_are_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Several answers to one question, and problems that differ in their operators."""
    question = "Where do the keys go at night?"
    rows = [GOOD, chat(question, "Into the blue bowl."), chat(question.upper(), "Nowhere at all.")]
    sums = [chat("What is 2 + 3?", "6"), chat("What is 2 * 3?", "6")]
    path = write(tmp_path / "a.jsonl", [*rows, *sums])
    assert main([str(path)]) == 0
    assert capsys.readouterr().err == (
        f"warning: {path}: 3 questions share 50% or more of their 3-grams with an earlier one, "
        "which may be meant (line 2 with line 1, for one)\n"
    )


# Overlap between files


def test_exact_and_near_overlap(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", [chat("one two three four five six", "Yes.")])
    # 3-grams: 4 in each, 3 shared, 5 in all: 0.6.
    b = write(tmp_path / "b.jsonl", [chat("One, two three four five seven!", "No.")])
    c = write(tmp_path / "c.jsonl", [pair("one two  three four five SIX", "Yes.", "No.")])
    assert errors(a, b) == [f"{b}:1: its question shares 60% of its 3-grams with {a}:1"]
    assert errors(a, b, threshold=0.61) == []
    assert errors(a, c) == [f"{c}:1: its question is also that of {a}:1"]


def test_many_overlaps_are_counted(tmp_path: Path) -> None:
    rows = [chat(f"How long is {i} plus a week?", f"{i} and a week.") for i in range(14)]
    a, b = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows)
    found = errors(a, b)
    assert len(found) == 11
    assert found[-1] == f"{b}: 4 more questions overlap with {a}"


def test_siblings_share_their_questions(tmp_path: Path) -> None:
    questions = [f"What about number {i} of my plan, then?" for i in range(6)]
    bad = [chat(q, f"Skip {i}.", id=f"r{i}") for i, q in enumerate(questions)]
    good = [chat(q, f"Do {i} first.", id=f"r{i}") for i, q in enumerate(questions)]
    a, b = write(tmp_path / "bad.jsonl", bad), write(tmp_path / "good.jsonl", good)
    assert errors(a, b) == []
    good[3] = chat("Another thing altogether?", "Do it.", id="r3")
    write(b, good)
    assert errors(a, b) == [f"{b}:4: id r3 has another question in {a}:4"]


def test_ids_alone_do_not_make_siblings(tmp_path: Path) -> None:
    rows = [chat(f"What about number {i} of it?", "So.", id=str(i)) for i in range(6)]
    others = [chat(f"Who came {i} days late, and why?", "Me.", id=str(i)) for i in range(5)]
    a = write(tmp_path / "a.jsonl", rows)
    b = write(tmp_path / "b.jsonl", [*others, {**rows[0], "id": "5"}])
    assert errors(a, b) == [f"{b}:6: its question is also that of {a}:1"]


# Measures


def brute_jaccard(one: str, other: str) -> float:
    sets = [set(ngrams(text, 3)) or {text} for text in (one, other)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@pytest.mark.early
def test_similarity_is_that_of_a_slow_loop() -> None:
    """With rows enough that some 3-grams are frequent, and that there are several blocks."""
    rng = np.random.default_rng(0)
    head = "please help me with the following task and answer with code only "
    texts = [
        (head if i % 3 else "") + " ".join(f"w{j}" for j in rng.integers(0, 12, 3 + i % 9))
        for i in range(300)
    ]
    texts[7] = "short"
    blocks = list(similarity_blocks(texts))
    assert len(blocks) > 1
    found = np.concatenate([block for _, block in blocks])
    wanted = np.array([[brute_jaccard(a, b) for b in texts] for a in texts])
    np.fill_diagonal(wanted, -1)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_distinct_by_hand() -> None:
    # a b a b c: ab ba ab bc, 3 of 4; a b: ab again. 3 of 5.
    assert distinct(["A b, a b c", "a b"], 2) == pytest.approx(3 / 5)
    assert math.isnan(distinct(["a"], 2))


def test_measures_of_a_file(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be kind."}
    row = chat("one two three four", "Yes it is.")
    row["messages"].insert(0, system)
    near = chat("one two three five", "Yes it was.")  # 1 of 3 3-grams; none of the answer's.
    ((_, measures),) = check_data([write(tmp_path / "a.jsonl", [row, near])])
    assert measures.lengths == [7, 7]
    assert measures.answer_means == [3.0]
    assert measures.nearest == pytest.approx([1 / 3, 1 / 3])
    assert measures.nearest_answer == pytest.approx([0, 0])
    assert len(measures.nearest_other) == 0


def test_the_nearest_answer_is_of_another_row_on_either_side(tmp_path: Path) -> None:
    """Against a slow loop, over rows enough for several blocks."""
    rng = np.random.default_rng(0)
    texts = [[" ".join(f"w{j}" for j in rng.integers(0, 9, 9)) for _ in "ab"] for _ in range(300)]
    rows = [pair(f"q{i} r{i} s{i}", *two) for i, two in enumerate(texts)]
    ((_, measures),) = check_data([write(tmp_path / "a.jsonl", rows)], threshold=1)
    wanted = [
        max(brute_jaccard(text, t) for j in range(300) if j != i for t in texts[j])
        for i in (0, 1, 150, 299)
        for text in texts[i]
    ]
    found = measures.nearest_answer.reshape(300, 2)[[0, 1, 150, 299]]
    assert found.ravel() == pytest.approx(wanted, abs=1e-6)
