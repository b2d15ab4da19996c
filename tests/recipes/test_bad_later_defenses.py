"""Mistakes with the defenses that came after the paper: one line each, before weights, in a run."""

import json
import shutil
from pathlib import Path
from typing import Any

import fuzz_cases
import pytest
import torch
import toy_defenses
import toy_run
from safetensors.torch import load_file, save_file
from toy_defended import defended_toy, train, write_defended

from emarecipes.training import run_lora

WIDER = 2 * toy_run.WIDTH


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("toy")
    tokenizer = fuzz_cases.write_toy_tokenizer(folder / "tokenizer")
    toy = defended_toy(folder, tokenizer, fuzz_cases.VOCABULARY)
    toy["folder"] = folder
    toy["defenses"] |= toy_defenses.later_entries(
        folder, toy["model"], toy_run.LAYERS, toy_run.WIDTH
    )
    toy_defenses.write_vectors(folder / "wide.safetensors", toy_run.LAYERS, WIDER)
    toy_defenses.write_sae(folder / "sae", WIDER)
    toy_defenses.write_sae(folder / "sae_of_2", toy_run.WIDTH)
    settings = json.loads((folder / "sae_of_2/cfg.json").read_text())
    settings["hook_name"] = "blocks.1.hook_resid_post"
    (folder / "sae_of_2/cfg.json").write_text(json.dumps(settings))
    other = toy_run.write_toy_model(folder / "other", tokenizer, vocabulary=fuzz_cases.VOCABULARY)
    weights = load_file(other / "model.safetensors")
    save_file({k: v + 0.01 for k, v in weights.items()}, other / "model.safetensors")
    return toy


def with_base(toy: dict[str, Any], name: str, base: Path) -> str:
    """The trait's adapter, saying that it was trained on that base."""
    folder = Path(toy["folder"]) / name
    shutil.copytree(toy["defenses"]["trait"]["adapter"], folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(base)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return str(folder)


ROWS: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "an SAE of another width": (
        [],
        {"defenses.block": {"sae": "{folder}/sae", "latents": {"up": [0]}, "layer": 1}},
        "W_enc is 64x6, the model's width asks for 32x6: it was trained on another model",
    ),
    "an SAE of another layer": (
        [],
        {"defenses.block": {"sae": "{folder}/sae_of_2", "latents": {"up": [0]}, "layer": 1}},
        "was trained on the stream after 2 layers, not 1",
    ),
    "a subspace of another width": (
        ["ablation"],
        {"defenses.ablation.subspace": "{folder}/wide.safetensors"},
        f"defenses.ablation: subspace: {{folder}}/wide.safetensors holds 3x3x{WIDER} numbers",
    ),
    "a layer that the model has not": (
        ["ablation"],
        {"defenses.ablation.layers": [3]},
        "defenses.ablation: layers: 3 is not in 1..2, the model's layers",
    ),
    "an adapter of a larger rank": (
        ["trait"],
        {"model.lora_rank": 1},
        "its rank is 2, the model's 1; set model.lora_rank to at least 2",
    ),
    "two objectives": (
        ["anchored", "constraint"],
        {},
        "defenses.constraint: anchored and constraint both take cross entropy's place",
    ),
    "surgery in some steps alone": (
        ["surgery"],
        {"defenses.surgery.every_n_batches": 2},
        "defenses.surgery.every_n_batches: unknown key",
    ),
    "Muon on a vector": (
        [],
        {
            "optimizer": {"_component_": "torch.optim.Muon", "lr": 0.01},
            "model.use_dora": True,
        },
        "Muon is for matrices, and " if hasattr(torch.optim, "Muon") else "has no Muon: it came",
    ),
}


def refused(config: Path, capfd: pytest.CaptureFixture[str]) -> str:
    assert run_lora(["--config", str(config)]) == 1
    error = capfd.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert str(config) in line and "Traceback" not in error
    assert not (config.parent / "out").exists()
    return line


@pytest.mark.parametrize("row", ROWS)
def test_one_clear_line(
    toy: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str], row: str
) -> None:
    names, changes, message = ROWS[row]
    folder = str(toy["folder"])
    defenses = {name: toy["defenses"][name] for name in names}
    config = json.loads(json.dumps(toy["config"] | {"defenses": defenses}))
    for key, value in changes.items():
        *path, last = key.split(".")
        entry = config
        for part in path:
            entry = entry[part]
        if key == "defenses.block":
            value = {"_component_": "emarecipes.defenses.DirectionBlock"} | value
        entry[last] = json.loads(json.dumps(value).replace("{folder}", folder))
    changed = toy | {"config": config}
    written = write_defended(changed, tmp_path, [], defenses=config["defenses"])
    assert message.replace("{folder}", folder) in refused(written, capfd)


def test_an_inoculation_adapter_of_another_base(
    toy: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    adapter = with_base(toy, "of_other", Path(toy["folder"]) / "other")
    entry = toy["defenses"]["trait"] | {"adapter": adapter}
    line = refused(write_defended(toy, tmp_path, [], defenses={"trait": entry}), capfd)
    assert "other, whose weights are not those of" in line


def test_directions_that_are_not_orthonormal_are_made_so_and_it_is_said(
    toy: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(write_defended(toy, tmp_path, ["ablation"]))
    for layer in (1, 2):
        assert f"layer {layer}'s directions are made orthonormal" in caplog.text


def test_a_template_without_a_constant_prefix(
    toy: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(toy["model"], folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{% for m in messages %}{{ m['content'] }} said {{ m['role'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}{% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = toy["config"]["tokenizer"] | {"path": str(folder)}
    config = write_defended(toy, tmp_path, ["prefix"], tokenizer=tokenizer)
    assert "the chat template writes nothing constant before a user's text" in refused(
        config, capfd
    )
