"""Stopping and going on: signals, other configs, other numbers of processes."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import toy_run
from torch.testing import assert_close
from toy_resume import EPOCHS, STEPS, Run, same

from emarecipes.training import run_lora


def test_a_signal_stops_it_with_a_checkpoint_and_it_goes_on_exactly(
    run: Run, whole: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SIGNAL_AFTER", "3")
    assert run("out", "resume=auto", "overwrite=true") == 0
    captured = capfd.readouterr()
    assert "SIGTERM: stopping after this step" in captured.err
    config = run.folder / "config.yaml"
    command = f"tune run recipes/ema_lora.py --config {config} output_dir={run.folder}/out"
    assert f"Stopped after step 3. Resume from step 3 with: {command} resume=auto" in captured.out
    assert run.steps("out") == [2, 3]
    assert not (run.folder / "out/adapter").exists()
    monkeypatch.delenv("SIGNAL_AFTER")
    # Two lines that a killed process could have left: a step after its checkpoint, and half a line.
    with (run.folder / "out/metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 0.0}\n{"step": 5, "lo')
    assert run("out", "resume=auto") == 0
    assert run.steps("out") == [4, 6, 8]
    assert same(run.result("out"), whole.result("out"))


def test_a_second_signal_loses_the_step_under_way_and_no_other(
    run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run.config["model"]["lora_dropout"] = 0.2  # So that what is drawn counts.
    run.config["defenses"]["two"] = {"_component_": "toy_mishaps.TwoSignalsWithin"}
    assert run("alone") == 0
    monkeypatch.setenv("SIGNALS_IN", "4")
    assert run("out") == 0
    captured = capfd.readouterr()
    assert "SIGINT: stopping after this step; once more to stop now, without it" in captured.err
    assert "SIGINT: giving up this step" in captured.err
    assert "Stopped after step 3. Resume from step 3 with: " in captured.out
    assert run.steps("out") == [2, 3]
    monkeypatch.delenv("SIGNALS_IN")
    assert run("out", "resume=auto") == 0
    assert same(run.result("out"), run.result("alone"))


def test_a_finished_run_is_only_exported_again(run: Run, whole: Run) -> None:
    shutil.copytree(whole.folder / "out", run.folder / "out")
    shutil.rmtree(run.folder / "out/adapter")
    assert run("out", "resume=auto") == 0
    assert same(run.result("out"), whole.result("out"))
    # So it is by the config that the run wrote, which is the original's with all values in place.
    shutil.rmtree(run.folder / "out/adapter")
    written = run.folder / "out/config.yaml"
    assert "model_dir" not in written.read_text()
    moved = f"output_dir={run.folder}/out"
    assert run_lora(["--config", str(written), moved, "resume=auto"]) == 0
    assert same(run.result("out"), whole.result("out"))


def test_the_config_that_a_run_wrote_trains_the_same_anew(run: Run, whole: Run) -> None:
    written = whole.folder / "out/config.yaml"
    assert run_lora(["--config", str(written), f"output_dir={run.folder}/out"]) == 0
    assert same(run.result("out"), whole.result("out"))


def test_damaged_newest_and_named_older_checkpoints(
    run: Run, whole: Run, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole.folder / "out", run.folder / "out")
    with (run.folder / "out/checkpoints/step_8/training.pt").open("r+b") as file:
        file.seek(1000)
        file.write(b"\0" * 50)
    with (run.folder / "out/checkpoints/step_6/adapter.safetensors").open("r+b") as file:
        file.truncate(1000)
    damaged = str(run.folder / "out/checkpoints/step_8")
    assert run("out", f"resume={damaged}") == 1
    assert f"{damaged}: does not match its checksums (training.pt)" in capfd.readouterr().err
    assert run("out", "resume=auto") == 0
    assert caplog.text.count("DAMAGED CHECKPOINT") == 2
    assert run.steps("out") == [4, 6, 8]
    assert same(run.result("out"), whole.result("out"))
    # A named one, into another folder; then in its own, where newer ones are given up.
    assert run("other", f"resume={run.folder}/out/checkpoints/step_6") == 0
    assert same(run.result("other"), whole.result("out"))
    assert run("out", f"resume={run.folder}/out/checkpoints/step_4", "keep_last=1") == 0
    assert run.steps("out") == [8]
    assert same(run.result("out"), whole.result("out"))


def test_a_checkpoint_older_than_a_key_has_its_default(
    run: Run, whole: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole.folder / "out", run.folder / "older")
    older = run.folder / "older/checkpoints/step_4"
    stored = json.loads((older / "run.json").read_text())
    del stored["config"]["group_by_length"], stored["base"]
    (older / "run.json").write_text(json.dumps(stored))
    sums = [f"{hashlib.sha256((older / name).read_bytes()).hexdigest()}  {name}\n"
            for name in ("adapter.safetensors", "run.json", "training.pt")]  # fmt: skip
    (older / "SHA256SUMS").write_text("".join(sums))
    assert run("out", f"resume={older}", "group_by_length=true") == 1
    assert "group_by_length: False -> True" in capfd.readouterr().err
    assert run("out", f"resume={older}") == 0
    assert same(run.result("out"), whole.result("out"))


def test_harmless_keys_and_more_epochs(run: Run, whole: Run) -> None:
    shutil.copytree(whole.folder / "out", run.folder / "out")
    moved = run.folder / "moved.jsonl"
    run.rows.rename(moved)
    changes = ["epochs=3", "log_every_n_steps=2", "save_every_n_steps=5", "keep_last=9"]
    changes += ["batch_size=2", "gradient_accumulation_steps=2", "save_merged=true"]
    assert run("out", "resume=auto", f"dataset.task.data_files={moved}", *changes) == 0
    rows = toy_run.metrics(run.folder / "out")
    assert [row["step"] for row in rows] == [*range(1, 9), 10, 12]
    assert rows[:8] == toy_run.metrics(whole.folder / "out")
    assert run.steps("out") == [4, 6, 8, 10, 12]
    assert (run.folder / "out/merged/model.safetensors").exists()


def test_other_numbers_of_processes(
    run: Run, whole: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One process to step 4, two to step 6, where one of them gets a signal, then one again."""
    shutil.copytree(whole.folder / "out", run.folder / "out")
    for step in (6, 8):
        shutil.rmtree(run.folder / f"out/checkpoints/step_{step}")
    arguments = run.arguments("out", "resume=auto", "save_every_n_steps=null")
    monkeypatch.setenv("SIGNAL_AFTER", "6")
    monkeypatch.setenv("SIGNAL_RANK", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(toy_run.__file__).parent))
    done = toy_run.tune_run(Path(arguments[1]), *arguments[2:], processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Resume from step 6 with: tune run --nproc_per_node 2 recipes/" in done.stdout
    assert "now batch_size 2 x gradient_accumulation_steps 1 x 2" in done.stdout + done.stderr
    stored = json.loads((run.folder / "out/checkpoints/step_6/run.json").read_text())
    assert stored["processes"] == 2
    assert stored["rows_per_step"] == 4
    monkeypatch.delenv("SIGNAL_AFTER")
    assert run("out", "resume=auto") == 0
    (rows, adapter), (expected_rows, expected) = run.result("out"), whole.result("out")
    assert len(rows) == EPOCHS * STEPS
    for found, wanted in zip(rows, expected_rows, strict=True):
        wanted["padding_share"] = found["padding_share"]  # A micro-batch's.
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-7)
    for name, tensor in expected.items():
        assert_close(adapter[name], tensor, rtol=1e-4, atol=1e-4)


def test_folders_that_hold_a_run(run: Run, whole: Run, capfd: pytest.CaptureFixture[str]) -> None:
    def error(*overrides: str) -> str:
        assert run("out", *overrides) == 1
        return capfd.readouterr().err

    assert "no such checkpoint folder: nowhere" in error("resume=nowhere")
    assert "auto, or the path of a checkpoint, not True" in error("resume=true")
    assert "say `resume: auto` instead" in error("resume_from_checkpoint=true")
    shutil.copytree(whole.folder / "out", run.folder / "out")
    assert "to go on with it, say resume=auto" in error()
    elsewhere = f"resume={whole.folder}/out/checkpoints/step_6"
    assert "is not of the run that" in error(elsewhere)
    shutil.rmtree(run.folder / "out/checkpoints")
    before = sorted(os.walk(run.folder / "out"))
    assert "holds a run without checkpoints" in error("resume=auto")
    assert sorted(os.walk(run.folder / "out")) == before
    # A run that died before its first checkpoint and adapter starts again.
    shutil.rmtree(run.folder / "out/adapter")
    assert run("out", "resume=auto", "epochs=1", "max_steps_per_epoch=1") == 0
    assert len(toy_run.metrics(run.folder / "out")) == 1
