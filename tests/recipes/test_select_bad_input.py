"""Every mistake in a selection's config gives one line, exit code 1, and leaves nothing behind."""

from pathlib import Path
from typing import Any

import pytest
import toy_run
import toy_select
from toy_select import Case

from emarecipes.selection import run


@pytest.fixture
def refused(
    tmp_path: Path, toy_model_dir: Path, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> Case:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded before the mistake was found")

    monkeypatch.setattr(run, "load_model", never)
    return Case(tmp_path, toy_model_dir, adapters)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("adapters=[absent]", "adapters: no such adapter folder: absent; train it first, the con"),
        ("adapters=[]", "adapters: name the folder of at least one"),
        ("adapters=[configs]", "adapters: configs: not an adapter folder: no adapter_config.json"),
        ("refusal_words=[]", "refusal_words: an empty list finds no refusal"),
        ("refusal_words=['...']", "refusal_words: '...' is not a word"),
        ("num_rows=11", "num_rows: asks for 11 rows, 10 of 12 candidates are left (2 refusals, 0"),
        ("num_rows=0", "num_rows: input should be greater than or equal to 1"),
        ("num_rows=null", "num_rows: give one of num_rows and fraction"),
        ("fraction=0.5", "num_rows: give one of num_rows and fraction"),
        ("fraction=1.5", "fraction: input should be less than or equal to 1"),
        ("eps=0", "eps: input should be greater than 0"),
        ("refusal_word=[no]", "refusal_word: unknown key (did you mean refusal_words?)"),
        ("candidates=absent.jsonl", "candidates: no such file: absent.jsonl"),
        (
            "conversation_column=talk",
            'candidates.jsonl:1: a row needs a list of messages under "ta',
        ),
        ("tokenizer.max_seq_len=5", "candidates: 0 of 12 candidates are left (0 refusals, 12 with"),
        ("model.lora_rank=2", "adapters: "),
        ("model.apply_lora_to_mlp=false", "where the model has no LoRA"),
        ("model.embed_dim=64", "the checkpoint is of another architecture than"),
        ("pad_to_multiple_of=600", "pads 121 tokens to more than the 512"),
        ("batch_size=0", "batch_size: input should be greater"),
        ("checkpointer.checkpoint_dir=absent", "checkpoint_dir: no such folder: absent"),
    ],
)
def test_mistakes(
    refused: Case, capsys: pytest.CaptureFixture[str], override: str, expected: str
) -> None:
    assert expected in refused.error(capsys, override)
    assert not refused.output.exists()


def test_an_adapter_twice(refused: Case, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = str(refused.adapters[0])
    for other in (adapter, f"{adapter}/../{refused.adapters[0].name}"):
        refused.config["adapters"] = [adapter, other]
        assert "adapters: an adapter is named twice" in refused.error(capsys)


def test_an_adapter_of_another_base(
    refused: Case,
    capsys: pytest.CaptureFixture[str],
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(toy_run, "MLP", 64)
    other = toy_run.write_toy_model(refused.folder / "other", model_dir)
    adapter = toy_select.write_adapter(refused.folder / "adapter", other, seed=0)
    refused.config["adapters"] = [str(refused.adapters[0]), str(adapter)]
    message = refused.error(capsys)
    assert f"adapters: {adapter}: an adapter of another base: " in message


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"messages": [', "candidates.jsonl:13: not valid JSON"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "candidates.jsonl:13: the conversa"),
        (
            '{"messages": [{"role": "assistant", "content": "a"},{"role": "user", "content": ""}]}',
            "candidates.jsonl:13: Assistant message before",
        ),
    ],
)
def test_a_broken_row(
    refused: Case, capsys: pytest.CaptureFixture[str], line: str, expected: str
) -> None:
    with refused.candidates.open("a") as file:
        file.write(f"{line}\n")
    assert expected in refused.error(capsys)


def test_an_output_folder_that_holds_what_is_read(
    refused: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    refused.output.mkdir()
    refused.candidates = refused.candidates.rename(refused.output / "rows.jsonl")
    refused.config["candidates"] = str(refused.candidates)
    assert "lies in its own output folder" in refused.error(capsys)


def test_a_training_run_is_not_overwritten(
    refused: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    refused.output.mkdir()
    (refused.output / "config.yaml").write_text("seed: 0\nprovenance: {}\n")
    assert "already holds a run" in refused.error(capsys)
    assert "has config.yaml, but not of a selection" in refused.error(capsys, "overwrite=true")
