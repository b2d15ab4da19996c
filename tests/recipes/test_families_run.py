"""Whole runs with `lora_model`: as torchtune's builder, on two processes, planned, refused."""

import json
import re
from pathlib import Path
from typing import Any

import family_toys
import pytest
import torch
import toy_run
import transformers
from omegaconf import OmegaConf
from ranks import run_ranks

from emarecipes.defenses import ModelSource
from emarecipes.models.adapters.read import load_adapter
from emarecipes.models.families.names import CONFIG_JSON
from emarecipes.plan import run_plan
from emarecipes.training import run_lora

KL = {"kl": {"_component_": "emarecipes.defenses.KLToReference", "weight": 0.5}}
LORA = {
    "_component_": "emarecipes.models.lora_model",
    "path": "${model_dir}",
    "lora_attn_modules": family_toys.ATTENTION,
    "apply_lora_to_mlp": True,
    "lora_rank": 4,
    "lora_alpha": 8,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    return toy_run.write_toy_model(tmp_path_factory.mktemp("llama") / "model", model_dir)


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """Random, of four layers, with the toy's tokenizer."""
    folder = toy_run.write_toy_model(tmp_path_factory.mktemp("gemma3") / "model", model_dir)
    torch.manual_seed(0)
    sizes = family_toys.SIZES | {"vocab_size": toy_run.VOCABULARY, "num_hidden_layers": 4}
    config = transformers.Gemma3TextConfig(
        **sizes | {"max_position_embeddings": 512}, head_dim=16, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2, query_pre_attn_scalar=16,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def write(model: Path, folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = toy_run.toy_config(model, toy_run.write_rows(folder / "rows.jsonl"), folder / "out")
    del config["checkpointer"]
    config |= {"model_dir": str(model), "model": LORA, "defenses": KL, "max_steps_per_epoch": 3}
    return toy_run.write_config(folder / "config.yaml", config | changes)


def losses(folder: Path) -> list[tuple[float, float]]:
    return [(m["loss"], m["kl"]) for m in toy_run.metrics(folder / "out")]


def test_losses_are_those_of_torchtunes_builder(llama: Path, tmp_path: Path) -> None:
    assert run_lora(["--config", str(write(llama, tmp_path / "own"))]) == 0
    stock = toy_run.toy_config(llama, tmp_path / "own" / "rows.jsonl", tmp_path / "stock" / "out")
    stock |= {"defenses": KL, "max_steps_per_epoch": 3}
    (tmp_path / "stock").mkdir()
    assert run_lora(["--config", str(toy_run.write_config(tmp_path / "stock.yaml", stock))]) == 0
    own, expected = losses(tmp_path / "own"), losses(tmp_path / "stock")
    assert len(own) == 3 and own[-1][1] > 1e-3
    assert own == [pytest.approx(pair, rel=1e-4) for pair in expected]


def test_gemma3_on_one_process_and_two(gemma3: Path, tmp_path: Path) -> None:
    """With rows beyond the window; the written config runs again; the adapter is PEFT's."""
    one = write(gemma3, tmp_path / "one")
    assert run_lora(["--config", str(one)]) == 0
    done = run_ranks(write(gemma3, tmp_path / "two"), "batch_size=2")
    assert done.returncode == 0, done.stderr[-3000:]
    expected = losses(tmp_path / "one")
    assert losses(tmp_path / "two") == [pytest.approx(pair, rel=1e-4) for pair in expected]

    written = tmp_path / "one" / "out" / "config.yaml"
    assert OmegaConf.load(written).checkpointer.checkpoint_dir == str(gemma3)
    again = [f"output_dir={tmp_path / 'again' / 'out'}"]
    assert run_lora(["--config", str(written), *again]) == 0
    assert losses(tmp_path / "again") == expected

    adapter = tmp_path / "one" / "out" / "adapter"
    rows = torch.randint(0, toy_run.VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(0))
    toy = family_toys.Toy(gemma3, family_toys.load_hf(gemma3), family_toys.load(gemma3))
    load_adapter(toy.model, adapter, ModelSource(toy.model, gemma3, CONFIG_JSON))
    found = family_toys.hf_logits(toy.peft(adapter), rows)
    assert family_toys.distance(found, toy.hf_logits(rows)) > 1e-2
    assert family_toys.distance(found, toy.logits(rows)) < 1e-4


def test_packed_rows_and_merged_weights(gemma3: Path, tmp_path: Path) -> None:
    config = write(gemma3, tmp_path, epochs=2, save_merged=True, max_steps_per_epoch=None)
    packed = ["dataset.packed=true", "batch_size=2", "enable_activation_checkpointing=true"]
    assert run_lora(["--config", str(config), *packed]) == 0
    merged = json.loads((tmp_path / "out" / "merged" / "config.json").read_text())
    assert merged["model_type"] == "gemma3_text"
    assert all(m["loss"] > 0 for m in toy_run.metrics(tmp_path / "out"))


def test_a_plan_needs_config_json_alone(
    gemma3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((gemma3 / "config.json").read_text())
    config = str(write(gemma3, tmp_path))
    assert run_plan([config]) == 0
    whole = capsys.readouterr().out
    assert run_plan([config, f"model_dir={bare}"]) == 0
    assert capsys.readouterr().out == whole
    assert "Predicted peak" in whole


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["checkpointer._component_=torchtune.training.FullModelHFCheckpointer"],
            "checkpointer: leave it out: lora_model's weights are those of model.path",
        ),
        (["~model.path"], "model: lora_model needs the key path, a model's folder"),
        (["model.path=nowhere"], "model.path: no such folder: nowhere; get the model as"),
        (["model.num_layers=4"], "model.num_layers: unknown key"),
        (["model.lora_attn_modules=[o_proj]"], "model.lora_attn_modules"),
        (["model.apply_lora_to_output=true"], "apply_lora_to_output: .* no place for an adapter"),
    ],
)
def test_mistakes_are_one_line(
    gemma3: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    expected: str,
) -> None:
    config = write(gemma3, tmp_path)
    assert run_lora(["--config", str(config), *overrides]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert re.search(expected, line), line
    assert not (tmp_path / "out").exists()
