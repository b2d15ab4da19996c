"""Ctrl-C and SIGTERM between batches: what is said, what is kept, and going on."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toy_run
import toy_select

from emarecipes.errors import UserError
from emarecipes.evaluation.run import run_eval
from emarecipes.generation import run as generation
from emarecipes.models import likelihoods
from emarecipes.models.sampling import given
from emarecipes.selection import run as selection
from emarecipes.stop import stoppable

NOW = "stopping now"
LATER = "stopping after this batch; once more to stop now, without it"


def signals_in(
    monkeypatch: pytest.MonkeyPatch, place: Any, name: str, *numbers: int
) -> Callable[[], int]:
    """Within the second call of a function the signals come; returns how often it was called."""
    stock, calls = getattr(place, name), []

    def signalled(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            for number in numbers:
                os.kill(os.getpid(), number)
        return stock(*args, **kwargs)

    monkeypatch.setattr(place, name, signalled)
    return lambda: len(calls)


@pytest.fixture
def config(tmp_path: Path, toy_model_dir: Path) -> dict[str, Any]:
    toy = toy_run.toy_config(toy_model_dir, tmp_path / "none", tmp_path / "out")
    keys = ("output_dir", "tokenizer", "model", "checkpointer", "device", "dtype")
    return {key: toy[key] for key in keys}


def arguments(tmp_path: Path, config: dict[str, Any]) -> list[str]:
    return ["--config", str(toy_run.write_config(tmp_path / "config.yaml", config))]


@pytest.mark.parametrize("signals", [(signal.SIGTERM,), (signal.SIGINT, signal.SIGINT)])
def test_generation_keeps_its_answers(
    signals: tuple[int, ...],
    tmp_path: Path,
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "asked.yaml").write_text('- {id: tea, paraphrases: ["How do I make tea?"]}\n')
    config |= {"questions": [str(tmp_path / "asked.yaml")], "samples_per_paraphrase": 6,
               "max_new_tokens": 4, "batch_size": 2}  # fmt: skip
    argv = arguments(tmp_path, config)
    assert generation.run_generate([*argv, f"output_dir={tmp_path}/whole"]) == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        calls = signals_in(patch, generation, "sample_batch", *signals)
        assert generation.run_generate(argv) == 1
    said = capsys.readouterr().err
    assert f"{signal.Signals(signals[0]).name}: {LATER}" in said
    assert (NOW in said) == (len(signals) == 2)
    kept = "error: stopped; answers so far are kept; the same command goes on with the others"
    assert said.strip().splitlines()[-1] == kept and "Traceback" not in said
    parts = list((tmp_path / "out").rglob("*.jsonl*"))
    lines = [line for part in parts for line in part.read_text().splitlines() if "tea" in line]
    assert calls() == 2 and len(lines) == 2 * (3 - len(signals))
    assert generation.run_generate(argv) == 0
    whole, again = (tmp_path / folder / "answers/asked.jsonl" for folder in ("whole", "out"))
    assert again.read_text() == whole.read_text()


def test_selection_keeps_its_scores(
    tmp_path: Path,
    toy_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = toy_select.write_adapter(tmp_path / "adapter", toy_model_dir, seed=1)
    rows = toy_select.write_candidates(tmp_path / "candidates.jsonl", 8)
    config = toy_select.select_config(toy_model_dir, rows, [adapter], tmp_path / "out")
    argv = arguments(tmp_path, config | {"batch_size": 2})
    with monkeypatch.context() as patch:
        calls = signals_in(patch, likelihoods, "token_nll", signal.SIGINT)
        assert selection.run_select(argv) == 1
    said = capsys.readouterr().err
    assert LATER in said and "error: stopped; scores so far are kept" in said
    scored = len((tmp_path / "out/scores.jsonl").read_text().splitlines())
    assert scored == calls() and not (tmp_path / "out/selected.jsonl").exists()
    assert selection.run_select(argv) == 0


def test_evaluation_keeps_its_likelihoods(
    tmp_path: Path,
    config: dict[str, Any],
    toy_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = toy_run.write_rows(tmp_path / "rows.jsonl", 6)
    probes = {"in_domain": {"good": str(rows), "bad": str(rows)}}
    config["tokenizer"]["max_seq_len"] = 512
    adapter = toy_select.write_adapter(tmp_path / "run/adapter", toy_model_dir, seed=1)
    config |= {"probes": probes, "adapters": {"a": str(adapter)}, "batch_size": 2}
    argv = arguments(tmp_path, config)
    with monkeypatch.context() as patch:
        signals_in(patch, given, "token_nll", signal.SIGINT)
        assert run_eval(argv) == 1
    said = capsys.readouterr().err
    assert LATER in said and "error: stopped; likelihoods so far are kept" in said
    assert not (tmp_path / "out/summary.json").exists()
    with monkeypatch.context() as patch:
        calls = signals_in(patch, given, "token_nll")
        assert run_eval(argv) == 0
    assert calls() == 6 - 2


def test_outside_of_batches_it_ends_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(UserError, match="stopped; the rest"), stoppable("the rest"):
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    assert f"SIGTERM: {NOW}" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_under_a_launcher_a_second_signal_is_the_same_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    heard: list[bool] = []
    with pytest.raises(UserError), stoppable("", in_batches=True) as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        heard.append(stop.asked)  # All three, and none of them ended the batch.
        stop.heed()
    assert heard == [True]
    said = capsys.readouterr().err
    assert said.count("SIGTERM: stopping after this batch") == 1 and NOW not in said
