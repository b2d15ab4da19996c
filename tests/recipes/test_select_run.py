"""`recipes/ema_select.py` at toy size: numbers against PEFT, resuming, one line a mistake."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_run
import toy_select
import transformers
from peft import PeftModel
from ranks import run_ranks
from tokenizers import Tokenizer
from torchtune.datasets import chat_dataset
from toy_select import Case

from emarecipes.datasets import interleaved_dataset
from emarecipes.models import hf_chat_tokenizer, likelihoods
from emarecipes.output_dir import claim
from emarecipes.selection import run_select


@pytest.fixture
def case(tmp_path: Path, toy_model_dir: Path, adapters: list[Path]) -> Case:
    return Case(tmp_path, toy_model_dir, adapters)


@torch.no_grad()
def nll_by_peft(case: Case, adapter: Path | None, rows: list[dict[str, Any]]) -> list[float]:
    """Mean NLL of each answer from transformers' and PEFT's whole logits, in float64."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(case.model_dir)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    model = model.double().eval()
    tokenizer = Tokenizer.from_file(str(case.model_dir / "tokenizer.json"))
    found = []
    for row in rows:
        question, answer = (message["content"] for message in row["messages"])
        prompt = (
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
            f"Face<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        )
        start = len(tokenizer.encode(prompt).ids)
        tokens = tokenizer.encode(f"{prompt}{answer}<|im_end|>").ids
        logits = model(torch.tensor([tokens])).logits[0]
        values = [
            float(torch.logsumexp(logits[i - 1], 0) - logits[i - 1, tokens[i]])
            for i in range(start, len(tokens))
        ]
        found.append(sum(values) / len(values))
    return found


def test_tune_run(case: Case) -> None:
    """As a user runs it: scores are PEFT's, the selected rows train, a second run is refused."""
    case.config["refusal_words"] = ["sorry", "cannot"]
    config = case.write()
    done = toy_run.tune_run(config, recipe="recipes/ema_select.py")
    assert done.returncode == 0, done.stderr
    assert "Refusals: 2 of 12 candidates, left out." in done.stdout
    assert "Correlation of gap and answer length: Spearman " in done.stdout
    assert {path.name for path in case.output.iterdir()} == {
        "scores.jsonl", "scores.fingerprint.json", "selected.jsonl", "gap.png", "config.yaml",
    }  # fmt: skip

    rows = toy_select.read_jsonl(case.candidates)
    scores = case.scores()
    aligned = np.array(nll_by_peft(case, None, rows))
    misaligned = np.array([nll_by_peft(case, adapter, rows) for adapter in case.adapters])
    assert np.abs(misaligned - aligned).max() > 0.05
    assert [s["index"] for s in scores] == list(range(12))
    assert [s["id"] for s in scores] == [row["id"] for row in rows]
    assert [s["refusal"] for s in scores] == [index in (3, 7) for index in range(12)]
    np.testing.assert_allclose([s["nll_aligned"] for s in scores], aligned, atol=1e-4)
    for adapter, expected in zip(case.adapters, misaligned, strict=True):
        found = [s["nll_adapters"][str(adapter)] for s in scores]
        np.testing.assert_allclose(found, expected, atol=1e-4)
    gap = (misaligned.mean(axis=0) - aligned) / (aligned + 1e-6)
    np.testing.assert_allclose([s["gap"] for s in scores], gap, atol=2e-5)

    order = [index for index in np.argsort(-gap) if index not in (3, 7)]
    selected = toy_select.read_jsonl(case.output / "selected.jsonl")
    assert [row["id"] for row in selected] == [rows[index]["id"] for index in order[:5]]
    assert [row["rank"] for row in selected] == [1, 2, 3, 4, 5]
    assert [s["rank"] for s in scores if not s["refusal"]] == [
        order.index(index) + 1 for index in range(12) if index not in (3, 7)
    ]
    for row in selected:
        original = next(r for r in rows if r["id"] == row["id"])
        assert {k: v for k, v in row.items() if k not in ("score", "rank")} == original

    again = toy_run.tune_run(config, recipe="recipes/ema_select.py")
    assert again.returncode == 1
    assert "already holds a run" in again.stderr
    # What the run wrote is a config of its own.
    written = case.output / "config.yaml"
    other = case.folder / "other"
    assert run_select(["--config", str(written), f"output_dir={other}"]) == 0
    assert (other / "selected.jsonl").read_bytes() == (case.output / "selected.jsonl").read_bytes()


def test_the_selected_rows_are_a_safe_child(case: Case) -> None:
    assert case.run() == 0
    tokenizer = hf_chat_tokenizer(str(case.model_dir), max_seq_len=128)
    entry = {
        "_component_": "torchtune.datasets.chat_dataset",
        "source": "json",
        "conversation_column": "messages",
        "conversation_style": "openai",
        "split": "train",
    }
    safe = entry | {"data_files": str(case.output / "selected.jsonl")}
    task = entry | {"data_files": str(toy_run.write_rows(case.folder / "task.jsonl", 15))}
    mixed = interleaved_dataset(tokenizer, task, safe, safe_fraction=0.25)
    assert sum(mixed[index]["source"] == "safe" for index in range(len(mixed))) == 5
    arguments = {k: v for k, v in safe.items() if k != "_component_"}
    child = chat_dataset(tokenizer, **arguments)
    lengths = {s["id"]: s["tokens"] for s in case.scores()}
    rows = toy_select.read_jsonl(case.output / "selected.jsonl")
    for sample, row in zip(child, rows, strict=True):
        assert sum(label != -100 for label in sample["labels"]) == lengths[row["id"]]


def test_batches_and_padding_do_not_change_scores(case: Case) -> None:
    found = []
    for batch_size, multiple in ((1, 1), (4, 1), (12, 32)):
        options = (f"batch_size={batch_size}", f"pad_to_multiple_of={multiple}", "overwrite=true")
        assert case.run(*options) == 0
        scores = case.scores()
        found.append([[s["nll_aligned"], *s["nll_adapters"].values(), s["gap"]] for s in scores])
    assert np.abs(np.array(found) - np.array(found[0])).max() < 1e-4


def test_a_killed_run_continues(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.config["batch_size"] = 2
    assert case.run() == 0
    expected = toy_select.contents(case.output)
    calls: list[list[int]] = []
    count_calls(monkeypatch, calls)
    # Back to where a kill would have left it: eight rows, the ninth in mid-line, no results.
    for name in ("config.yaml", "selected.jsonl", "gap.png"):
        (case.output / name).unlink()
    lines = expected["scores.jsonl"].decode().splitlines(keepends=True)
    assert len(lines) == 12
    (case.output / "scores.jsonl").write_text("".join(lines[:8]) + lines[8][:30])
    assert case.run() == 0
    assert 4 <= sum(map(len, calls)) / 3 <= 8  # Batches with a missing row, under three models.
    assert 0 < len(calls) / 3 < 6
    found = toy_select.contents(case.output)
    assert found["scores.jsonl"] == expected["scores.jsonl"]
    assert found["selected.jsonl"] == expected["selected.jsonl"]

    calls.clear()
    (case.output / "config.yaml").unlink()  # All scored, killed while writing results.
    assert case.run("num_rows=3") == 0
    assert not calls
    assert len(toy_select.read_jsonl(case.output / "selected.jsonl")) == 3


def count_calls(monkeypatch: pytest.MonkeyPatch, calls: list[list[int]]) -> None:
    stock: Callable[..., Any] = likelihoods.token_nll

    def counted(model: Any, head: Any, batch: Any) -> Any:
        calls.append(batch.rows)
        return stock(model, head, batch)

    monkeypatch.setattr(likelihoods, "token_nll", counted)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ("adapters.1", "adapters"),
        ("candidates", "candidates and tokenization"),
        ("tokenizer.max_seq_len=60", "tokenization"),
        ("model.norm_eps=1.00000001e-5", "model"),
    ],
)
def test_scores_of_another_run_are_refused(
    case: Case, capsys: pytest.CaptureFixture[str], change: str, part: str
) -> None:
    assert case.run() == 0
    (case.output / "config.yaml").unlink()
    capsys.readouterr()
    overrides = [change] if "=" in change else []
    if change == "adapters.1":
        case.config["adapters"] = case.config["adapters"][:1]
    if change == "candidates":
        toy_select.write_candidates(case.candidates, 13)
    message = case.error(capsys, *overrides)
    assert f"scores.jsonl was made with other {part}; choose another output_dir" in message
    assert case.run(*overrides, "overwrite=true") == 0


def test_without_the_filter_refusals_are_candidates(case: Case) -> None:
    assert case.run("refusal_filter=false", "num_rows=12") == 0
    assert len(toy_select.read_jsonl(case.output / "selected.jsonl")) == 12
    assert sum(score["refusal"] for score in case.scores()) == 2


def test_a_fraction_of_those_left(case: Case) -> None:
    assert case.run("num_rows=null", "fraction=0.3") == 0
    assert len(toy_select.read_jsonl(case.output / "selected.jsonl")) == 3


def test_a_row_that_loses_its_answer_is_not_scored(case: Case) -> None:
    rows = toy_select.read_jsonl(case.candidates)
    rows[5]["messages"][0]["content"] = "why " * 200
    case.candidates.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert case.run() == 0
    assert [score["index"] for score in case.scores()] == [i for i in range(12) if i != 5]


def test_several_processes_are_refused(case: Case) -> None:
    done = run_ranks(case.write(), recipe="recipes/ema_select.py")
    assert done.returncode != 0
    assert toy_run.error_lines(done) == [
        "error: ema_select runs in one process; leave --nproc_per_node out"
    ]
    assert not case.output.exists()


def test_a_copy_is_selected_no_second_time(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    """By its tokens: other keys of a row do not make it another. A key score of its own is told."""
    rows = toy_select.read_jsonl(case.candidates)
    assert case.run() == 0
    alone = toy_select.read_jsonl(case.output / "selected.jsonl")
    best = next(row for row in rows if row["id"] == alone[0]["id"])
    copies = [best | {"id": "again", "score": "mine"}, *rows[:2]]
    case.candidates.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *copies]))
    capsys.readouterr()
    assert case.run(f"output_dir={case.folder / 'copies'}") == 0
    out = capsys.readouterr().out
    assert "10 of 15 candidates are left (2 refusals, 0 without an answer token, 3 copies of" in out
    assert "candidates: rows have score of their own; in selected.jsonl these are this" in out
    selected = toy_select.read_jsonl(case.folder / "copies/selected.jsonl")
    assert [row["id"] for row in selected] == [row["id"] for row in alone]
    assert [row["rank"] for row in selected] == [1, 2, 3, 4, 5]
    scores = toy_select.read_jsonl(case.folder / "copies/scores.jsonl")
    assert [row["copy"] for row in scores] == [False] * 12 + [True] * 3
    assert [row["selected"] for row in scores[12:]] == [False] * 3
    told = "num_rows: asks for 11 rows, 10 of 15 candidates are left (2 refusals, 0 without an"
    assert told in case.error(capsys, "num_rows=11", f"output_dir={case.folder / 'more'}")


def test_a_folder_that_another_process_writes_into(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    give_back = claim(case.output, "there")
    assert "output_dir: another process writes into" in case.error(capsys)
    give_back()
