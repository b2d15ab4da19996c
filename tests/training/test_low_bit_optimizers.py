"""torchao's optimizers with a quantized state: exact on one process, refused on several."""

from pathlib import Path
from typing import Any

import pytest
import toy_run
from ranks import run_ranks
from safetensors.torch import load_file

from emarecipes.errors import UserError
from emarecipes.training import run_lora
from emarecipes.training.checked import CheckedRun
from emarecipes.training.checkpoint import read_checkpoint

# The type of a quantized state, by optimizer; torchao's plain form has none.
KINDS = {
    "AdamW8bit": "OptimState8bit",
    "AdamW4bit": "OptimState4bit",
    "AdamWFp8": "OptimStateFp8",
    "_AdamW": "Tensor",
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("toy")
    model = toy_run.write_toy_model(folder / "model", model_dir)
    config = toy_run.toy_config(model, toy_run.write_rows(folder / "rows.jsonl"), folder)
    # Matrices of 4096 numbers, the least that torchao quantizes, and all of one kind.
    config["model"] |= {
        "lora_attn_modules": ["q_proj"],
        "apply_lora_to_mlp": False,
        "lora_rank": 128,
    }
    config["tokenizer"]["max_seq_len"] = 64
    return config | {"metric_logger": None, "save_every_n_steps": 2, "keep_last": 9}


def write(toy: dict[str, Any], folder: Path, kind: str) -> Path:
    folder.mkdir()
    optimizer = {"_component_": f"torchao.optim.{kind}", "lr": 2e-2}
    changes = {"output_dir": str(folder / "out"), "optimizer": optimizer}
    return toy_run.write_config(folder / "config.yaml", toy | changes)


@pytest.mark.long  # torchao compiles its step.
@pytest.mark.parametrize("kind", KINDS)
def test_on_one_process_it_resumes_bit_for_bit(
    toy: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    assert run_lora(["--config", str(write(toy, tmp_path / "a", kind))]) == 0
    checkpoint = tmp_path / "a/out/checkpoints/step_2"
    state = read_checkpoint(checkpoint).training()["optimizer"]["state"]
    assert {type(s["exp_avg_sq"]).__name__ for s in state.values()} == {KINDS[kind]}
    again = write(toy, tmp_path / "b", kind)
    assert run_lora(["--config", str(again), f"resume={checkpoint}"]) == 0
    losses, adapters = zip(*(result(tmp_path / name / "out") for name in "ab"), strict=True)
    assert losses[0] == losses[1]
    assert all(tensor.equal(adapters[1][name]) for name, tensor in adapters[0].items())
    # Were the state lost, Adam would begin anew, and another adapter come out.
    assert len(losses[0]) == 5


def result(output: Path) -> tuple[list[float], dict[str, Any]]:
    adapter = load_file(output / "adapter/adapter_model.safetensors")
    return [row["loss"] for row in toy_run.metrics(output)], adapter


def test_on_two_processes_it_is_refused_in_one_line(toy: dict[str, Any], tmp_path: Path) -> None:
    config = write(toy, tmp_path / "a", "AdamW8bit")
    done = run_ranks(config, "batch_size=2")
    assert done.returncode != 0
    (line,) = toy_run.error_lines(done)
    assert "optimizer: AdamW8bit's state cannot be stored from 2 processes" in line
    assert "use torch.optim.AdamW, or one process" in line
    assert not (tmp_path / "a/out").exists()


@pytest.mark.parametrize("name", ["Adafactor", "Rprop"])
def test_a_step_that_shards_do_not_allow_is_refused(
    toy: dict[str, Any], tmp_path: Path, name: str
) -> None:
    """torch 2.14 ends in the first step: DTensor has no norm in place, nor a choice by signs."""
    config = write(toy, tmp_path / "a", "AdamW8bit")
    argv = ["--config", str(config), f"optimizer._component_=torch.optim.{name}", "batch_size=2"]
    CheckedRun(argv, world_size=1, rank=0)
    with pytest.raises(UserError, match=f"optimizer: {name} cannot take a step with the shards"):
        CheckedRun(argv, world_size=2, rank=0)
