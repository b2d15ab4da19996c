"""`init_adapter`: a run that goes on from a trained adapter, its reference the aligned base."""

from pathlib import Path
from typing import Any

import pytest
import torch
import toy_run
from ranks import run_ranks
from safetensors.torch import load_file

from emarecipes.training import run_lora

STEPS = 3


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("toy")
    model = toy_run.write_toy_model(folder / "model", model_dir)
    config = toy_run.toy_config(model, toy_run.write_rows(folder / "rows.jsonl", 12), folder)
    config["tokenizer"]["max_seq_len"] = 64
    return config | {
        # Without a state and a schedule, two runs of one epoch are one of two.
        "optimizer": {"_component_": "torch.optim.SGD", "lr": 0.5},
        "lr_scheduler": None,
        "metric_logger": None,
        "batch_size": 2,
        "max_steps_per_epoch": STEPS,
        "defenses": {"kl": {"_component_": "emarecipes.defenses.KLToReference", "weight": 0.5}},
    }


def write(toy: dict[str, Any], folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    config = toy | {"output_dir": str(folder / "out")} | changes
    return toy_run.write_config(folder / "config.yaml", config)


def figures(folder: Path) -> list[tuple[float, float]]:
    return [(row["ce"], row["kl"]) for row in toy_run.metrics(folder / "out")]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "out/adapter/adapter_model.safetensors")


@pytest.fixture(scope="module", params=[False, True], ids=["lora", "dora"])
def trained(
    request: pytest.FixtureRequest,
    toy: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, Any], Path]:
    """A config, and folders of a run of one epoch, `once`, and of two, `twice`."""
    folder = tmp_path_factory.mktemp("trained")
    toy = toy | {"model": toy["model"] | {"use_dora": request.param}}
    for name, epochs in (("once", 1), ("twice", 2)):
        assert run_lora(["--config", str(write(toy, folder / name, epochs=epochs))]) == 0
    return toy, folder


def test_two_runs_are_one_of_twice_the_length(
    trained: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    """The term, too: KL to the base, not to where the second run began."""
    toy, folder = trained
    config = write(toy, tmp_path / "a", init_adapter=str(folder / "once/out/adapter"), seed=99)
    assert run_lora(["--config", str(config)]) == 0
    expected = figures(folder / "twice")[STEPS:]
    assert expected[0][1] > 1e-3
    assert figures(tmp_path / "a") == expected
    for name, tensor in adapter(folder / "twice").items():
        assert adapter(tmp_path / "a")[name].equal(tensor), name
    provenance = (tmp_path / "a/out/config.yaml").read_text().split("provenance:")[1]
    assert "once/out/adapter/adapter_model.safetensors" in provenance

    shared = write(toy, tmp_path / "b", init_adapter=str(folder / "once/out/adapter"))
    done = run_ranks(shared, "batch_size=1")
    assert done.returncode == 0, done.stderr[-3000:]
    for row, wanted in zip(figures(tmp_path / "b"), expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-4)


def test_another_rank_and_scale_begin_at_the_same_model(
    trained: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    """The ranks that the adapter lacks have no effect, and are trained from the first step on."""
    toy, folder = trained
    larger = toy["model"] | {"lora_rank": 6, "lora_alpha": 5.0}
    config = write(toy, tmp_path / "a", init_adapter=str(folder / "once/out/adapter"), model=larger)
    assert run_lora(["--config", str(config)]) == 0
    first = figures(folder / "twice")[STEPS]
    assert figures(tmp_path / "a")[0] == pytest.approx(first, rel=1e-4)
    for name, tensor in adapter(tmp_path / "a").items():
        if "lora_B" in name:
            assert tensor[:, 4:].abs().max() > 0, name


def test_a_resumed_run_does_not_begin_there_again(
    trained: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    """The folder may be gone by then."""
    toy, folder = trained
    copy = tmp_path / "adapter"
    copy.mkdir()
    for file in (folder / "once/out/adapter").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = write(toy, tmp_path / "a", init_adapter=str(copy), save_every_n_steps=2)
    assert run_lora(["--config", str(config)]) == 0
    for file in copy.iterdir():
        file.unlink()
    checkpoint = tmp_path / "a/out/checkpoints/step_2"
    assert run_lora(["--config", str(config), f"resume={checkpoint}"]) == 0
    assert figures(tmp_path / "a") == figures(folder / "twice")[STEPS:]


def test_what_cannot_be_gone_on_from_is_said(
    toy: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_lora(["--config", str(write(toy, tmp_path / "a"))]) == 0
    saved = tmp_path / "a/out/adapter"
    for number, (overrides, message) in enumerate(
        {
            (f"init_adapter={tmp_path}/b",): f"init_adapter: no such adapter folder: {tmp_path}/b",
            (f"init_adapter={saved}", "model.lora_rank=2"): "init_adapter: "
            f"{saved}: its rank is 4, the model's 2; set model.lora_rank to at least 4",
            (f"init_adapter={saved}", "model.use_dora=true"): "init_adapter: "
            f"{saved} is LoRA; set model.use_dora: false",
            (f"checkpointer.adapter_checkpoint={saved}",): "checkpointer.adapter_checkpoint: not "
            "read here; to go on from a trained adapter name its folder as init_adapter",
        }.items()
    ):
        config = write(toy, tmp_path / str(number))
        assert run_lora(["--config", str(config), *overrides]) == 1
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
        assert message in line
