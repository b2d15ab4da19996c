"""Stopping and going on: signals, other configs, other numbers of processes, broken numbers."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import toy_defenses
import toy_run
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from emarecipes.training import run_lora

EPOCHS, STEPS = 2, 4


class Run:
    """A toy run with interleaving, dropout and a KL term, in the process of the test."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.rows = toy_run.write_rows(folder / "rows.jsonl", 15)
        config = toy_run.toy_config(model, self.rows, folder / "out")
        config["tokenizer"]["max_seq_len"] = 64
        safe = toy_defenses.write_safe_rows(folder / "safe.jsonl")
        self.config: dict[str, Any] = toy_run.with_variable(config) | {
            "dataset": toy_defenses.interleaved(config["dataset"], safe),
            "shuffle": True,
            "epochs": EPOCHS,
            "max_steps_per_epoch": STEPS,
            "metric_logger": None,
            "save_every_n_steps": 2,
            "keep_last": 3,
            # Where a gradient is nearly zero, Adam makes up to a learning rate of its rounding.
            "optimizer": {"_component_": "torch.optim.AdamW", "lr": 2e-3},
            "defenses": {
                "kl": {"_component_": "emarecipes.defenses.KLToReference", "weight": 0.5},
                "signal": {"_component_": "toy_mishaps.SignalAfter"},
            },
        }

    def arguments(self, output: str, *overrides: str) -> list[str]:
        path = toy_run.write_config(self.folder / "config.yaml", self.config)
        return ["--config", str(path), f"output_dir={self.folder / output}", *overrides]

    def __call__(self, output: str, *overrides: str) -> int:
        return run_lora(self.arguments(output, *overrides))

    def steps(self, output: str) -> list[int]:
        return sorted(int(p.name[5:]) for p in (self.folder / output / "checkpoints").iterdir())

    def result(self, output: str) -> tuple[list[dict[str, float]], dict[str, Any]]:
        rows = toy_run.metrics(self.folder / output)
        for row in rows:
            row.pop("tokens_per_second")
        adapter = self.folder / output / "adapter/adapter_model.safetensors"
        return rows, load_file(adapter)


@pytest.fixture(scope="module")
def toy_model_dir(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    return toy_run.write_toy_model(tmp_path_factory.mktemp("toy") / "model", model_dir)


@pytest.fixture
def run(tmp_path: Path, toy_model_dir: Path) -> Run:
    return Run(tmp_path, toy_model_dir)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, toy_model_dir: Path) -> Run:
    """A finished run, to be copied."""
    run = Run(tmp_path_factory.mktemp("whole"), toy_model_dir)
    assert run("out") == 0
    return run


def same(one: Any, other: Any) -> bool:
    equal = all(other[1][name].equal(tensor) for name, tensor in one[1].items())
    return one[0] == other[0] and equal


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


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["defenses.kl.weight=0.25", "optimizer.lr=0.1"],
            "change the result: defenses.kl.weight: 0.5 -> 0.25; optimizer.lr: 0.002 -> 0.1.",
        ),
        (["~defenses.kl"], "defenses.kl.weight: 0.5 -> None"),
        (["seed=8"], "seed: 7 -> 8"),
        (["batch_size=2"], "batch_size: 4 -> 2"),
        (["epochs=1"], "epochs: 2 -> 1"),
        (["model.lora_dropout=0.1"], "model.lora_dropout: 0.0 -> 0.1"),
        (["dataset.task.data_files=SHORT"], "the rows are not those of"),
    ],
)
def test_a_config_that_changes_the_result_is_refused(
    run: Run,
    whole: Run,
    overrides: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded before the mistake was found")

    monkeypatch.setattr("emarecipes.training.recipe.LoRATraining._build_model", never)
    short = toy_run.write_rows(run.folder / "short.jsonl", 14)
    overrides = [o.replace("SHORT", str(short)) for o in overrides]
    arguments = whole.arguments("out", "resume=auto", *overrides)
    assert run_lora(arguments) == 1
    assert expected in capfd.readouterr().err


@pytest.mark.parametrize("name", ["persona", "trait"])
def test_what_a_defense_reads_and_that_changed_is_refused(
    run: Run, name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Half of the steps with one vector or adapter, half with another, is no run."""
    model = Path(run.config["model_dir"])
    shape = tmp_path / "files", model, toy_run.LAYERS, toy_run.WIDTH
    entries = toy_defenses.defense_entries(*shape) | toy_defenses.later_entries(*shape)
    run.config["defenses"] |= {name: entries[name]}
    assert run("out") == 0
    shutil.rmtree(run.folder / "out/adapter")
    kept = {"persona": "vectors.safetensors", "trait": "trait/adapter_model.safetensors"}[name]
    file = tmp_path / "files" / kept
    whole = file.read_bytes()
    tensors = load_file(file)
    save_file({key: tensor * 1.001 for key, tensor in tensors.items()}, file)
    capfd.readouterr()
    assert run("out", "resume=auto") == 1
    (error,) = [s for s in capfd.readouterr().err.splitlines() if s.startswith("error: ")]
    assert f"defenses.{name}: a file that it reads changed since {run.folder}" in error
    file.write_bytes(whole)
    assert run("out", "resume=auto") == 0


def test_a_base_that_changed_is_refused(
    run: Run, whole: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole.folder / "out", run.folder / "out")
    base = Path(run.config["model_dir"])
    kept = shutil.copytree(base, tmp_path / "kept")

    def refused(name: str) -> None:
        capfd.readouterr()
        assert run("out", "resume=auto") == 1
        (error,) = [s for s in capfd.readouterr().err.splitlines() if s.startswith("error: ")]
        assert f"checkpointer.checkpoint_dir: {name} in {base} changed since {run.folder}" in error
        shutil.copy2(kept / name, base / name)

    try:
        tensors = load_file(base / "model.safetensors")
        tensors["model.norm.weight"][3] *= 1.001
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        refused("model.safetensors")
        settings = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 1e-6}))
        refused("config.json")
        # Written anew with the same content it is the same base.
        (base / "config.json").write_text(json.dumps(settings))
        assert run("out", "resume=auto") == 0
    finally:
        shutil.copytree(kept, base, dirs_exist_ok=True)


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


def broken(run: Run, kind: str, *steps: int) -> None:
    entry = {"_component_": "toy_mishaps.Broken", "steps": list(steps), "kind": kind}
    run.config["defenses"] = {"broken": entry, "kl": run.config["defenses"]["kl"]}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("nan", "step 3: the loss is not finite (broken nan); rows "),
        ("inf", "step 3: the loss is not finite (broken inf); rows "),
        ("gradient", "step 3: the gradient of broken is not finite; rows "),
    ],
)
def test_numbers_that_go_wrong_are_named(
    run: Run, kind: str, expected: str, capfd: pytest.CaptureFixture[str]
) -> None:
    broken(run, kind, 3)
    run.config["shuffle"] = False
    run.config["dataset"] = run.config["dataset"]["task"]
    assert run("out") == 1
    error = capfd.readouterr().err
    assert f"{expected}8, 9, 10, 11. Lower the learning rate" in error
    assert "Resume from step 2 with: tune run" in error
    assert run.steps("out") == [2]
    assert not (run.folder / "out/adapter").exists()


def test_the_search_for_what_broke_a_gradient_changes_no_later_step(run: Run) -> None:
    """A loss that is not finite takes no further forwards, a gradient one for each term."""
    figures = {}
    for kind in ("nan", "gradient"):
        broken(run, kind, 2)
        assert run(kind, "skip_nonfinite=1", "model.lora_dropout=0.2") == 0
        rows = toy_run.metrics(run.folder / kind)
        assert [row["step"] for row in rows if row.get("skipped")] == [2]
        figures[kind] = [(row["ce"], row["kl"]) for row in rows if row["step"] != 2]
    assert len(figures["nan"]) == EPOCHS * STEPS - 1
    assert figures["gradient"] == figures["nan"]


def test_so_many_steps_are_skipped_and_no_more(
    run: Run, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(run, "nan", 2, 5)
    run.config["defenses"]["signal"] = {"_component_": "toy_mishaps.SignalAfter"}
    assert run("whole", "skip_nonfinite=2") == 0
    rows = [json.loads(line) for line in (run.folder / "whole/metrics.jsonl").open()]
    assert [row["step"] for row in rows if row.get("skipped")] == [2, 5]
    assert "broken" not in rows[1]
    assert all(isinstance(value, int | float) for row in rows for value in row.values())
    # The count of skipped steps and the defense's own state go through a resume.
    monkeypatch.setenv("SIGNAL_AFTER", "3")
    assert run("out", "skip_nonfinite=2") == 0
    assert run("out", "skip_nonfinite=2", "resume=auto") == 0
    assert same(run.result("out"), run.result("whole"))
    capfd.readouterr()
    assert run("one", "skip_nonfinite=1") == 0
    assert run("one", "skip_nonfinite=1", "resume=auto") == 1
    assert "step 5: the loss is not finite (broken nan)" in capfd.readouterr().err


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
