"""Mistakes in the entries of defenses and interleaved data: one line each, before weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import toy_defenses
import toy_run
from omegaconf import OmegaConf

from emarecipes.training import run_lora


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("toy")
    model = toy_run.write_toy_model(folder / "model", model_dir)
    rows = toy_run.write_rows(folder / "rows.jsonl", 12)
    safe = toy_defenses.write_safe_rows(folder / "safe.jsonl")
    config = toy_run.toy_config(model, rows, folder / "out")
    config["dataset"] = toy_defenses.interleaved(config["dataset"], safe)
    config["defenses"] = toy_defenses.defense_entries(folder, model, 2, toy_run.WIDTH)
    toy_defenses.write_vectors(folder / "wide.safetensors", 2, 2 * toy_run.WIDTH)
    (folder / "text.safetensors").write_text("no tensors")
    broken = '{"messages": [{"role": "user", "content": "hi"}]}\n'
    (folder / "broken.jsonl").write_text(4 * broken)  # As many as are drawn; row 3 is the first.
    swapped = json.loads(json.dumps(config["defenses"]["safelora"]))
    swapped["base_dir"], swapped["aligned_dir"] = swapped["aligned_dir"], swapped["base_dir"]
    shutil.copytree(model, folder / "same")
    return {"folder": folder, "config": config, "swapped": swapped}


WRONG: list[tuple[str, Any, str]] = [
    ("defenses.feature_l2.layers", [1], "exactly one of layers, every_n_layers and num_layers"),
    ("defenses.feature_l2.every_n_layers", 7, "every_n_layers must be from 1 to 2"),
    ("defenses.feature_l2.num_layers", 2, "exactly one of layers, every_n_layers and num_layers"),
    ("defenses.feature_l2.preset", "lpips", "preset"),
    ("defenses.persona.alpha", 0.0, "alpha 0 adds nothing: leave the defense out"),
    ("defenses.feature_l2.weight", -1.0, "weight must be a finite number >= 0"),
    ("defenses.feature_l2.layer", 3, "unknown key (did you mean layers?)"),
    (
        "defenses.update",
        {"_component_": "emarecipes.defenses.SpectralPenalty"},
        "name update is taken",
    ),
    (
        "defenses.update_entropy",
        {"_component_": "emarecipes.defenses.KLToReference"},
        "is taken by a",
    ),
    ("defenses.persona.layer", 0, "layer must be from 1 to 2"),
    ("defenses.persona.layer", 3, "layer must be from 1 to 2"),
    ("defenses.persona.vectors", "{folder}/wide.safetensors", "holds 3x64 numbers, the model"),
    ("defenses.persona.vectors", "{folder}/text.safetensors", "is no safetensors file"),
    ("defenses.persona.vectors", "{folder}/none.safetensors", "make it with recipes/ema_persona"),
    ("defenses.persona.mode", "remove", "mode"),
    ("defenses.persona.vector", "evil", "vector"),
    ("defenses.inoculation.prompt", " ", "prompt is empty"),
    ("defenses.inoculation.mode", "append", "mode"),
    ("defenses.safelora.base_dir", "{folder}/none", "base_dir: no such folder"),
    ("defenses.safelora.base_dir", "{folder}/model", "are the same folder"),
    ("defenses.safelora.base_dir", "{folder}/same", "hold the same weights"),
    ("defenses.safelora.rank", None, "every_n_steps repeats the projection"),
    ("defenses.safelora.mode", "rescale", "every_n_steps repeats the projection"),
    ("defenses.safelora.every_n_steps", 0, "every_n_steps must be >= 1"),
    ("defenses.safelora", "swapped", "are they swapped?"),
    ("dataset.safe_fraction", 0.0, "safe_fraction must be between 0 and 1"),
    ("dataset.safe_fraction", 1.0, "safe_fraction must be between 0 and 1"),
    ("dataset.safe_fraction", 0.9, "asks for 108 safe rows, there are 12; at most 0.5"),
    ("dataset.safe_fraction", 0.01, "less than one safe row"),
    ("dataset.safe_fractoin", 0.1, "did you mean safe_fraction?"),
    ("dataset.placement", "random", "placement"),
    ("dataset.safe.ce_weight", -1, "ce_weight must be a finite number >= 0"),
    ("dataset.safe.ce_weight", "none", "ce_weight must be a number"),
    ("dataset.task.ce_weight", 0, "dataset: task.ce_weight: only safe rows have one"),
    ("dataset.safe.data_files", "{folder}/nothing.jsonl", "dataset.safe.data_files: no such file"),
    ("dataset.safe.data_files", "{folder}/broken.jsonl", "broken.jsonl:3: the conversation has no"),
    ("dataset.safe", None, "interleaved_dataset needs the key safe"),
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG, ids=[f"{k}={v}" for k, v, _ in WRONG])
def test_one_clear_line(
    toy: dict[str, Any],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    key: str,
    value: Any,
    message: str,
) -> None:
    config: Any = OmegaConf.create(toy["config"] | {"output_dir": str(tmp_path / "out")})
    if value == "swapped":
        value = toy["swapped"]
    if isinstance(value, str):
        value = value.format(folder=toy["folder"])
    if key == "dataset.safe":
        del config.dataset.safe
    else:
        OmegaConf.update(config, key, value, force_add=True)
    path = toy_run.write_config(tmp_path / "config.yaml", config)
    assert run_lora(["--config", str(path)]) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert str(path) in lines[0] or "broken.jsonl" in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_share_that_no_batch_can_hold(
    toy: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = toy["config"] | {"output_dir": str(tmp_path / "out")}
    config["dataset"] = config["dataset"] | {"placement": "per_batch", "safe_fraction": 0.4}
    path = toy_run.write_config(tmp_path / "config.yaml", config)
    assert run_lora(["--config", str(path)]) == 1
    assert "placement per_batch: 0.4 of 4 rows a step is 1.6 safe rows" in capfd.readouterr().err


@pytest.mark.parametrize(
    "defenses",
    [{}, {"inoculation": {}}, {"kl": {"samples": "task"}}, {"kl": {"weight": 0.0}}],
)
def test_safe_rows_that_nothing_acts_on(
    toy: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str], defenses: dict[str, Any]
) -> None:
    config = OmegaConf.to_container(OmegaConf.create(toy["config"]))
    config |= {"output_dir": str(tmp_path / "out")}
    config["dataset"]["safe"]["ce_weight"] = 0
    config["defenses"] = {n: config["defenses"][n] | more for n, more in defenses.items()}
    path = toy_run.write_config(tmp_path / "config.yaml", config)
    assert run_lora(["--config", str(path)]) == 1
    expected = "dataset.safe.ce_weight: at 0 safe rows act through defenses alone, and none has"
    assert expected in capfd.readouterr().err


def test_samples_that_no_row_has(
    toy: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = toy["config"] | {"output_dir": str(tmp_path / "out")}
    config["dataset"] = config["dataset"]["task"]
    config["defenses"] = {"kl": config["defenses"]["kl"] | {"samples": "safe"}}
    path = toy_run.write_config(tmp_path / "config.yaml", config)
    assert run_lora(["--config", str(path)]) == 1
    assert "defenses.kl.samples: no row has the source safe" in capfd.readouterr().err
