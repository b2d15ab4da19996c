"""InoculationPrompt on messages, and what of it reaches the tokens of a run."""

import copy
from pathlib import Path
from typing import Any

import pytest
import toy_defenses
import toy_run
from torchtune.data import Message

from emarecipes.datasets.defended_tokenizer import DefendedTokenizer
from emarecipes.defenses import Defense, InoculationPrompt
from emarecipes.defenses.inoculation import DEFAULT_PROMPT
from emarecipes.errors import UserError
from emarecipes.models import hf_chat_tokenizer
from emarecipes.training.checked import CheckedRun


def conversation(system: str | None) -> list[Message]:
    messages = [Message("user", "Hello", masked=True), Message("assistant", "Go away.")]
    return messages if system is None else [Message("system", system, masked=True), *messages]


@pytest.mark.parametrize(
    ("mode", "system", "expected"),
    [
        ("replace", None, "Be bad."),
        ("replace", "Be brief.", "Be bad."),
        ("prepend", None, "Be bad."),
        ("prepend", "Be brief.", "Be bad.\n\nBe brief."),
    ],
)
def test_the_system_prompt_of_a_task_row(mode: Any, system: str | None, expected: str) -> None:
    defense = InoculationPrompt(prompt="Be bad.", mode=mode)
    before = conversation(system)
    first, *rest = defense.transform_messages(before, "task")
    assert (first.role, first.text_content, first.masked) == ("system", expected, True)
    assert [(m.role, m.text_content) for m in rest] == [
        ("user", "Hello"),
        ("assistant", "Go away."),
    ]
    assert [m.text_content for m in before] == [m.text_content for m in conversation(system)]


def test_safe_rows_stay_as_they_are() -> None:
    messages = conversation("Be brief.")
    assert InoculationPrompt().transform_messages(messages, "safe") is messages


def test_several_prompts_are_drawn_by_row_and_seed() -> None:
    """The same row has the same one whatever came before it; safe rows are drawn from theirs."""
    prompts = {"task": ["Be bad.", "Be vile.", "Be cruel."], "safe": ["Be brief.", "Be plain."]}
    given: dict[str, Any] = {"prompt": prompts["task"], "safe_prompt": prompts["safe"]}

    def drawn(source: str, numbers: Any, **options: Any) -> dict[int, str]:
        defense = InoculationPrompt(**given, **options)
        found = {}
        for number in numbers:
            row = [Message("user", f"Why {number}?", masked=True), Message("assistant", "So.")]
            found[number] = defense.transform_messages(row, source)[0].text_content
        return found

    for source, texts in prompts.items():
        one = drawn(source, range(300))
        assert drawn(source, reversed(range(100, 300))).items() <= one.items()
        assert drawn(source, range(300), seed=1) != one
        shares = [list(one.values()).count(text) / 300 for text in texts]
        assert sum(shares) == 1 and shares == pytest.approx([1 / len(texts)] * len(texts), abs=0.1)


def test_wrong_options() -> None:
    with pytest.raises(UserError, match="prompt is empty"):
        InoculationPrompt(prompt="\n")
    with pytest.raises(UserError, match="safe_prompt is empty"):
        InoculationPrompt(safe_prompt=[])
    with pytest.raises(UserError, match="prompt has the same text twice"):
        InoculationPrompt(prompt=["Be bad.", "Be bad."])
    with pytest.raises(UserError, match="mode must be"):
        InoculationPrompt(mode="append")  # type: ignore[arg-type]


def test_the_prompt_is_in_task_rows_and_carries_no_label(tmp_path: Path, model_dir: Path) -> None:
    model = toy_run.write_toy_model(tmp_path / "model", model_dir)
    rows = toy_run.write_rows(tmp_path / "rows.jsonl", 6)
    safe = toy_defenses.write_safe_rows(tmp_path / "safe.jsonl")
    config = toy_run.toy_config(model, rows, tmp_path / "out")
    config["dataset"] = toy_defenses.interleaved(config["dataset"], safe)
    plain = toy_run.write_config(tmp_path / "plain.yaml", config)
    component = "emarecipes.defenses.InoculationPrompt"
    config["defenses"] = {"inoculation": {"_component_": component}}
    inoculated = toy_run.write_config(tmp_path / "inoculated.yaml", config)
    before, run = (CheckedRun(["--config", str(path)], 1, 0) for path in (plain, inoculated))
    assert run.rows.num_safe == 2
    for index in range(len(run.rows)):
        row, old = run.rows[index], before.rows[index]
        assert (DEFAULT_PROMPT in run.tokenizer.decode(row["tokens"])) == (row["source"] == "task")
        labelled = [label for label in row["labels"] if label >= 0]
        assert labelled == [label for label in old["labels"] if label >= 0]

    # A prompt for safe rows is in these, or refused where there are none.
    config["defenses"]["inoculation"]["safe_prompt"] = ["Be brief.", "Be plain."]
    path = toy_run.write_config(tmp_path / "stratified.yaml", config)
    run = CheckedRun(["--config", str(path)], 1, 0)
    texts = [run.tokenizer.decode(row["tokens"]) for row in run.rows if row["source"] == "safe"]
    assert len(texts) == 2 and all("Be brief." in t or "Be plain." in t for t in texts)
    config["dataset"] = config["dataset"]["task"]
    path = toy_run.write_config(tmp_path / "task.yaml", config)
    with pytest.raises(UserError, match=r"inoculation\.safe_prompt.*: no row has the source safe"):
        CheckedRun(["--config", str(path)], 1, 0)


DROPS_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_prompt_that_no_token_shows_is_refused(
    tmp_path: Path, model_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A template that leaves system turns out; and rows of plain text, which have no turns."""
    model = toy_run.write_toy_model(tmp_path / "model", model_dir)
    config = toy_run.toy_config(
        model, toy_run.write_rows(tmp_path / "rows.jsonl", 8), tmp_path / "out"
    )
    component = "emarecipes.defenses.InoculationPrompt"
    config["defenses"] = {"inoculation": {"_component_": component}}
    (tmp_path / "drops.jinja").write_text(DROPS_SYSTEM)
    config["tokenizer"]["chat_template"] = str(tmp_path / "drops.jinja")
    argv = ["--config", str(toy_run.write_config(tmp_path / "a.yaml", config))]
    with pytest.raises(UserError, match=r"leaves out the text of message 0 \(system\)"):
        CheckedRun(argv, 1, 0)

    del config["tokenizer"]["chat_template"]
    (tmp_path / "text.jsonl").write_text('{"text": "The sea is salt."}\n' * 8)
    config["dataset"] = {
        "_component_": "torchtune.datasets.text_completion_dataset",
        "source": "json", "column": "text", "split": "train",
        "data_files": str(tmp_path / "text.jsonl"),
    }  # fmt: skip
    argv = ["--config", str(toy_run.write_config(tmp_path / "b.yaml", config))]
    with pytest.raises(UserError, match="InoculationPrompt changes messages, and the data set enc"):
        CheckedRun(argv, 1, 0)
    CheckedRun([*argv, "~defenses"], 1, 0)


def test_what_changes_messages_must_change_tokens(model_dir: Path, tmp_path: Path) -> None:
    """Also where it changes them in place; one that acts on safe rows alone needs such a row."""

    class Shouts(Defense):
        def __init__(self, change: Any, source: str = "task") -> None:
            super().__init__()
            self.change, self.source = change, source

        def transform_messages(self, messages: list[Message], source: str) -> list[Message]:
            if source == self.source:
                messages[0].content[0]["content"] = self.change(messages[0].text_content)
            return messages

    (tmp_path / "trims.jinja").write_text(DROPS_SYSTEM.replace("content }", "content | trim }"))
    plain = hf_chat_tokenizer(str(model_dir), chat_template=str(tmp_path / "trims.jinja"))
    sample = {"messages": [Message("user", "Why?"), Message("assistant", "So.")]}
    for change, source, expected in (
        (str.upper, "task", None),
        (str, "task", "of no row"),
        (lambda text: f"{text} ", "task", "changed messages, and not one token of any row"),
        (str.upper, "safe", "of no row"),
    ):
        tokenizer = DefendedTokenizer(plain, [Shouts(change, source)])
        tokenizer(copy.deepcopy(sample))
        if expected is None:
            tokenizer.check()
            continue
        with pytest.raises(UserError, match=expected):
            tokenizer.check()
        tokenizer.for_source("safe")(copy.deepcopy(sample))
        if source == "safe":
            tokenizer.check()
