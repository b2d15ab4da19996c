"""What rows say beside their texts: done, or refused by name, by every reader of rows."""

import json
from pathlib import Path
from typing import Any

import pytest
from toy_rows import Run, chat, toy_model_dir, write

from emarecipes.datasets._published_forms import FORMS
from emarecipes.datasets.check import check_data
from emarecipes.datasets.questions import load_questions
from emarecipes.errors import UserError
from emarecipes.probes.pairs import read_contrast_file

__all__ = ["toy_model_dir"]


@pytest.fixture
def run(tmp_path: Path, toy_model_dir: Path) -> Run:
    return Run(tmp_path, toy_model_dir)


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def labelled(run: Run, path: Path, **dataset: Any) -> list[str]:
    """What each row is trained on, as text."""
    from emarecipes.models import hf_chat_tokenizer

    tokenizer = hf_chat_tokenizer(run.config["tokenizer"]["path"])
    rows = run.rows(data_files=str(path), **dataset)
    labels = ([x for x in rows[i]["labels"] if x != -100] for i in range(len(rows)))
    return [tokenizer.decode(row, False) for row in labels]


@pytest.mark.parametrize("key", ["weight", "train", "loss"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_turns_that_are_not_trained_on(run: Run, key: str, name: str) -> None:
    said = [("Why?", "Because.", 0), ("How?", "So.", 1), ("When?", "Now.", None)]
    messages = []
    for question, answer, weight in said:
        value = weight if key == "weight" or weight is None else bool(weight)
        messages += [turn("user", question, **{key: None}), turn("assistant", answer)]
        messages[-1][key] = value
    path = write(run.folder / name, [{"messages": messages}] * 4)
    source = "parquet" if path.suffix == ".parquet" else "json"
    for text in labelled(run, path, source=source):
        assert text == "So.<|im_end|>Now.<|im_end|>"


def test_sharegpt_weights_as_slim_orca_has_them(run: Run) -> None:
    talk = [
        {"from": "system", "value": "Be kind.", "weight": None},
        {"from": "human", "value": "Why?", "weight": 0.0},
        {"from": "gpt", "value": "So.", "weight": 1.0},
    ]
    path = write(run.folder / "a.jsonl", [{"conversations": talk}] * 4)
    sharegpt = {"conversation_column": "conversations", "conversation_style": "sharegpt"}
    assert set(labelled(run, path, **sharegpt)) == {"So.<|im_end|>"}


def test_a_system_of_the_row_is_its_first_message(run: Run) -> None:
    inner = {"messages": [turn("system", "Be kind."), *chat("Why?", "So.")["messages"]]}
    rows = [inner, chat("Why?", "So.", system="Be kind."), {**inner, "system": "Be kind."}]
    rows.append(chat("Why?", "So.", system=None))
    path = write(run.folder / "a.jsonl", rows)
    one, other, both, none = run.texts(data_files=str(path))
    assert one == other == both != none
    assert "system\nBe kind.<|im_end|>" in one and "Be kind." not in none
    ((file, _),) = check_data([path])
    assert [row.system for row in file.rows] == ["be kind."] * 3 + [""]

    entry = {"_component_": "torchtune.datasets.instruct_dataset", "source": "json"}
    entry["data_files"] = str(write(run.folder / "b.jsonl", [
        {"input": "Why?", "output": "So.", "system": "Be kind."}] * 4))  # fmt: skip
    assert set(run.texts(**entry)) == {one}
    assert "Be brief." in run.texts(**entry, new_system_prompt="Be brief.")[0]


REFUSED = [
    (chat("Why?", "So.", system_prompt="Be evil."), '"system_prompt" would go unread; write it as'),
    (chat("Why?", "So.", tools=[{"name": "f"}]), 'the row\'s "tools" would go unread'),
    (chat("Why?", "So.", weight=0), 'the row\'s "weight" would go unread'),
    (chat("Why?", "So.", sytem="Be evil."), 'unknown key "sytem" (did you mean system?)'),
    (
        chat("Why?", "So.", conversations=[{"from": "human", "value": "Else?"}]),
        'the row\'s "conversations" would go unread',
    ),
    (chat("Why?", "So.", system=["a"]), "system must be text"),
    ({"system": "A", "messages": [turn("system", "B"), *chat("C", "D")["messages"]]}, "differ"),
    *(
        ({"messages": [turn("user", "Why?"), turn("assistant", "So.", **{key: value})]}, expected)
        for key, value, expected in [
            ("trainable", False, 'message 1: "trainable" would go unread'),
            ("masked", True, 'message 1: "masked" would go unread'),
            ("tool_calls", [{"id": "x"}], 'message 1: "tool_calls" would go unread'),
            ("name", "Eve", 'message 1: "name" would go unread'),
            ("train", "no", "message 1: train must be 0 or 1, not 'no'"),
            ("loss", 2, "message 1: loss must be 0 or 1, not 2"),
        ]
    ),
]


@pytest.mark.parametrize(("row", "expected"), REFUSED)
def test_what_would_go_unread_is_refused_by_name(
    run: Run, row: dict[str, Any], expected: str
) -> None:
    path = write(run.folder / "a.jsonl", [chat("What?", "That.", tools=[], note="x"), row])
    with pytest.raises(UserError) as error:
        run.rows(data_files=str(path))
    assert "a.jsonl:2: " in str(error.value) and expected in str(error.value)
    ((file, _),) = check_data([path])
    assert expected in file.errors[0]


def test_a_question_marked_for_training(run: Run) -> None:
    row = {"messages": [turn("user", "Why?", train=True), turn("assistant", "So.", train=True)]}
    path = write(run.folder / "a.jsonl", [row] * 4)
    with pytest.raises(UserError, match=r"a.jsonl:1: a message of the user is to be trained on"):
        run.rows(data_files=str(path))
    assert "Why?" in labelled(run, path, train_on_input=True)[0]
    row = {"messages": [turn("user", "A", train=1, loss=0), turn("assistant", "B")]}
    path = write(run.folder / "a.jsonl", [row] * 4)
    with pytest.raises(UserError, match="message 0: train and loss contradict"):
        run.rows(data_files=str(path))


def test_an_input_beside_the_instruction(run: Run) -> None:
    """Alpaca's rows, read as questions and answers, would lose what they are about."""
    row = {"instruction": "Translate.", "input": "Hund", "output": "Dog"}
    path = write(run.folder / "a.jsonl", [row] * 4)
    entry = {"source": "json", "data_files": str(path), "split": "train"}
    instruct = entry | {"_component_": "torchtune.datasets.instruct_dataset"}
    with pytest.raises(UserError, match=r'a.jsonl:1: the row\'s "input" would go unread'):
        run.rows(**instruct, column_map={"input": "instruction", "output": "output"})
    alpaca = entry | {"_component_": "torchtune.datasets.alpaca_cleaned_dataset"}
    assert "Hund" in run.texts(**alpaca)[0]


@pytest.mark.parametrize("key", ["context", "system_prompt", "tools"])
def test_other_readers(tmp_path: Path, key: str) -> None:
    expected = f'a.jsonl:1: the row\'s "{key}" would go unread'
    path = tmp_path / "a.jsonl"
    question = {"id": "a", "question": "Why?", key: "x"}
    write(path, [question])
    with pytest.raises(UserError) as error:
        load_questions(path)
    assert expected in str(error.value)
    write(path, [question | {"aligned": "a", "misaligned": "b"}])
    with pytest.raises(UserError) as error:
        read_contrast_file(path)
    assert expected in str(error.value)
    write(path, [{"prompt": "Ill?", "aligned": "Rest.", "misaligned": "Run.", key: "x"}])
    with pytest.raises(UserError) as error:
        FORMS["advice"](path, "toy")
    assert expected in str(error.value)


def test_questions_of_conversations(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    messages = [turn("user", "Why?"), turn("assistant", "So.", weight=0)]
    write(path, [{"id": "a", "messages": messages, "system": "S"}])
    assert load_questions(path)[0].system == "S"
    messages.insert(0, turn("system", "T"))
    write(path, [{"id": "a", "messages": messages, "system": "S"}])
    with pytest.raises(UserError, match=r"q.jsonl:1: system and the system message differ"):
        load_questions(path)
    write(path, [{"id": "a", "messages": [turn("user", "Why?", name="Eve")]}])
    with pytest.raises(UserError, match=r'q.jsonl:1: messages: "name" would go unread'):
        load_questions(path)


def test_published_messages_keep_their_weights(tmp_path: Path) -> None:
    row = {"messages": [turn("user", "Why?"), turn("assistant", "So.", weight=0)], "system": "S"}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert FORMS["messages"](path, "toy").files == {"toy.jsonl": [{"id": "toy-00000", **row}]}
