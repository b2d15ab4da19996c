"""The validator: what it refuses, with the line; its measures against slow or hand-made ones."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import toy_run
from toy_check import GOOD, chat, errors, pair, write

from emarecipes.datasets.check import check_data, main

PUBLISHED = toy_run.REPO.parent / "shared/published"


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
    assert len(rows) == 15
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
