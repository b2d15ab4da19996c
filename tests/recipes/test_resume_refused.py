"""Runs that are not resumed: configs, files and bases that have changed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import toy_defenses
import toy_run
from safetensors.torch import load_file, save_file
from toy_resume import Run

from emarecipes.training import run_lora


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

    monkeypatch.setattr("emarecipes.models._torchtune_recipe.StockRecipe.build_model", never)
    short = toy_run.write_rows(run.folder / "short.jsonl", 14)
    overrides = [o.replace("SHORT", str(short)) for o in overrides]
    arguments = whole.arguments("out", "resume=auto", *overrides)
    assert run_lora(arguments) == 1
    assert expected in capfd.readouterr().err


def edit(file: Path) -> None:
    """Other vectors, or an autoencoder's latents without `b_dec`."""
    if file.suffix == ".json":
        settings = json.loads(file.read_text())
        file.write_text(json.dumps(settings | {"apply_b_dec_to_input": False}))
    else:
        save_file({key: tensor * 1.001 for key, tensor in load_file(file).items()}, file)


@pytest.mark.parametrize("name", ["persona", "trait", "block"])
def test_what_a_defense_reads_and_that_changed_is_refused(
    run: Run, name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Half of the steps with one vector or adapter, half with another, is no run."""
    model = Path(run.config["model_dir"])
    shape = tmp_path / "files", model, toy_run.LAYERS, toy_run.WIDTH
    entries = toy_defenses.defense_entries(*shape) | toy_defenses.later_entries(*shape)
    sae = toy_defenses.write_sae(tmp_path / "files/sae", toy_run.WIDTH)
    entries["block"] = {
        "_component_": "emarecipes.defenses.DirectionBlock",
        "sae": str(sae),
        "latents": {"up": [1, 4], "down": [2]},
        "layer": 1,
    }
    run.config["defenses"] |= {name: entries[name]}
    assert run("out") == 0
    shutil.rmtree(run.folder / "out/adapter")
    kept = {
        "persona": "vectors.safetensors",
        "trait": "trait/adapter_model.safetensors",
        "block": "sae/cfg.json",
    }[name]
    file = tmp_path / "files" / kept
    whole = file.read_bytes()
    edit(file)
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
