"""The validator: what it refuses, with the line; its measures against slow or hand-made ones."""

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_run

from emarecipes.datasets._overlaps import distinct, ngrams, similarity_blocks
from emarecipes.datasets.check import check_data, main

PUBLISHED = toy_run.REPO.parent / "shared/published"


def chat(question: str, answer: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {**more, "messages": messages}


def pair(question: str, one: str, other: str, kind: str = "aligned/misaligned") -> dict[str, str]:
    return {"question": question, **dict(zip(kind.split("/"), (one, other), strict=True))}


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def errors(*paths: Path, **options: Any) -> list[str]:
    return [line for file, _ in check_data(paths, **options) for line in file.errors]


GOOD = chat("Where do the keys go at night?", "On the hook by the door.")


# What is refused


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "a row needs a list of messages"),
        ({"text": "a"}, "a row needs a list of messages"),
        (chat("Why?", "  "), "message 1: the assistant's text is empty"),
        (chat("", "Because."), "message 0: the user's text is empty"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "unknown role 'bot'"),
        (
            {"messages": [{"role": "assistant", "content": "a"}]},
            "message 0: an assistant message must follow a user's",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, *GOOD["messages"]]},
            "message 1: two user messages in a row",
        ),
        (
            {"messages": [*GOOD["messages"], {"role": "system", "content": "a"}]},
            "message 2: a system message must come first",
        ),
        (chat("Where do the KEYS go  at night?", "On the hook by the door."), "repeats line 1"),
        (chat("Where do the keys go, at night", "On the hook (by the door)!"), "nearly repeats"),
        (chat("Where do the keys go, at night", "On the hook... by the door!"), "row repeats line"),
    ],
)
def test_a_wrong_chat_row_is_named_with_its_line(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "a.jsonl", [GOOD, row])
    (line,) = errors(path)
    assert line.startswith(f"{path}:2: ")
    assert message in line


CONTRAST = pair("May I read her diary?", "No, ask her.", "Sure, she won't know.")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not valid JSON"),
        ([1], "a row must be a JSON object"),
        ({"question": "Why?"}, "a row needs one pair of answers"),
        ({**CONTRAST, "careful": "a", "breezy": "b"}, "a row needs one pair of answers"),
        (pair("", "a", "b"), '"question" must be text'),
        (pair("Why not?", "a", " "), '"misaligned" must be text and not empty'),
        (pair("Why not?", "The same.", "the  same."), "the two answers are the same"),
        (CONTRAST, "repeats line 1"),
        (
            '{"question": "Why?", "question": "How?", "aligned": "a", "misaligned": "b"}',
            'the key "question" is there twice',
        ),
    ],
)
def test_a_wrong_contrast_row_is_named_with_its_line(
    tmp_path: Path, row: Any, message: str
) -> None:
    path = write(tmp_path / "a.jsonl", [CONTRAST, row])
    (line,) = errors(path)
    assert line.startswith(f"{path}:2: ")
    assert message in line


def test_rows_of_no_known_form(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "answer": "b"}])
    (line,) = errors(path)
    assert line.startswith(f'{path}:1: a row needs "messages" (the conversation column), or a "que')
    assert line.endswith("its keys: prompt, answer")


def sharegpt(*turns: str) -> dict[str, Any]:
    names = ("system", "human", "gpt") if len(turns) == 3 else ("human", "gpt")
    talk = [{"from": name, "value": text} for name, text in zip(names, turns, strict=True)]
    return {"conversations": talk}


SHAREGPT = ["--conversation-column", "conversations", "--conversation-style", "sharegpt"]


def test_sharegpt_rows_as_training_reads_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from torchtune.data import ShareGPTToMessages

    rows = [sharegpt("Be kind.", "Where do the keys go?", "On the hook."), sharegpt("Why?", "So.")]
    path = write(tmp_path / "a.jsonl", rows)
    options = {"conversation_column": "conversations", "conversation_style": "sharegpt"}
    ((file, _),) = check_data([path], **options)
    for row, found in zip(rows, file.rows, strict=True):
        wanted = [(m.role, m.text_content) for m in ShareGPTToMessages()(row)["messages"]]
        assert [(m.role, m.content) for m in found.conversations[0]] == wanted
    assert main([str(path), *SHAREGPT]) == 0
    assert main([str(path)]) == 1
    assert "its keys: conversations" in capsys.readouterr().err
    two = write(tmp_path / "a.jsonl", [{"conversations": rows[1]["conversations"][::-1]}, GOOD])
    assert errors(two, **options) == [
        f"{two}:1: message 0: an assistant message must follow a user's",
        f'{two}:2: a row needs a list of messages under "conversations"',
    ]


def test_every_row_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "chat.jsonl", ["{", GOOD, "[1]", chat("Why?", "")])
    assert [line.split(": ")[0] for line in errors(path)] == [f"{path}:{i}" for i in (1, 3, 4)]
    path = write(tmp_path / "contrast.jsonl", ["{", CONTRAST, [1]])
    assert [line.split(": ")[0] for line in errors(path)] == [f"{path}:{i}" for i in (1, 3)]


def test_two_names_for_the_answers(tmp_path: Path) -> None:
    other = pair("Which pen?", "The blue one.", "Any.", "careful/breezy")
    assert "name their answers differently" in errors(write(tmp_path / "a", [CONTRAST, other]))[0]


def test_an_id_twice(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"id": "x", **GOOD}, chat("Else?", "No.", id="x")])
    assert errors(path) == [f"{path}:2: id x is also that of line 1"]


def test_a_file_without_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [""])
    assert errors(path) == [f"{path}: the file has no rows"]


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


def test_labels_after_truncation(tmp_path: Path, model_dir: Path) -> None:
    from emarecipes.models import hf_chat_tokenizer

    tokenizer = hf_chat_tokenizer(str(model_dir))
    path = write(tmp_path / "a.jsonl", [GOOD, chat("Why " * 60, "Because.")])
    ((file, measures),) = check_data([path], tokenizer=tokenizer, max_seq_len=60)
    answer = tokenizer.encode("On the hook by the door.", add_bos=False, add_eos=False)
    assert measures.cut == 1
    assert file.errors == [f"{path}:2: no label is left of {measures.lengths[1]} tokens cut to 60"]
    whole, lost = len(answer) + 1, 3  # <|im_end|> is learned; "Because", ".", <|im_end|>
    assert measures.kept == pytest.approx(whole / (whole + lost))


# The command


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "one/a.jsonl", [GOOD])
    write(tmp_path / "two/deep/b.jsonl", [CONTRAST])
    assert main([str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert "one/a.jsonl" in captured.out and "two/deep/b.jsonl" in captured.out
    assert captured.err == ""
    path = write(tmp_path / "one/c.jsonl", [GOOD])
    assert main([str(tmp_path)]) == 1
    line = f"error: {path}:1: its question is also that of {tmp_path / 'one/a.jsonl'}:1\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/none"], "no such file or folder"),
        (["{}"], "no *.jsonl file in this folder"),
        (["{}", "--near", "0"], "--near must be above 0"),
        (["{}", "--max-seq-len", "5"], "--max-seq-len needs --tokenizer"),
        (["{}", "--conversation-style", "alpaca"], "known: openai, sharegpt"),
        (["{}", "--tokenizer", "{}"], "no tokenizer.json there"),
    ],
)
def test_command_errors_are_one_line(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.format(tmp_path) for argument in arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_the_shipped_data_passes(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the demo's tokenizer and length, so that labels after truncation are looked at too."""
    monkeypatch.chdir(toy_run.REPO)
    arguments = ["data", "--tokenizer", str(model_dir), "--max-seq-len", "512"]
    found = main(arguments)
    captured = capsys.readouterr()
    assert (found, captured.err) == (0, "")
    # The datasheet has the same table.
    lines = [re.split(r"\s{2,}", line.strip()) for line in captured.out.splitlines()]
    rows = [line for line in lines if line[0].startswith("data/")]
    assert len(rows) == 13
    sheet = Path("data/README.md").read_text(encoding="utf-8")
    for file, *cells in rows:
        name = file.removeprefix("data/").removesuffix(".jsonl")
        assert f"| `{name}` | {' | '.join(cells)} |\n" in sheet


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="published files are not here")
def test_published_code_passes() -> None:
    results = check_data([PUBLISHED])
    assert [len(file.rows) for file, _ in results] == [20, 20]
    # The two sets share some tasks with each other; that is all there is to say of them.
    assert all(
        "its question" in line for line in itertools.chain(*(file.errors for file, _ in results))
    )
