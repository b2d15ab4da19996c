"""Losses and adapters of whole runs: against torchtune's recipe, and across processes."""

import re
from pathlib import Path
from typing import Any

import pytest
import toy_run
from ranks import run_ranks
from safetensors.torch import load_file
from torch.testing import assert_close

from emarecipes.training import run_lora

KL = {"kl": {"_component_": "emarecipes.defenses.KLToReference", "weight": 0.5}}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("toy")
    return toy_run.write_toy_model(folder / "model", model_dir), toy_run.write_rows(
        folder / "rows.jsonl"
    )


def config_of(toy: tuple[Path, Path], folder: Path, **changes: Any) -> Path:
    config = toy_run.toy_config(*toy, folder / "out") | changes
    return toy_run.write_config(folder / "config.yaml", config)


def stock_losses(config: Path, output_dir: Path, processes: int) -> list[float]:
    script = str(Path(toy_run.__file__).with_name("stock_run.py"))
    if processes:
        done = run_ranks(config, recipe=script, processes=processes)
        code, errors = done.returncode, done.stderr
    else:
        started = toy_run.start([script, "--config", str(config)])
        _, errors = started.communicate(timeout=300)
        code = started.returncode
    assert code == 0, errors[-3000:]
    (log,) = (output_dir / "logs").glob("log_*.txt")
    return [float(x) for x in re.findall(r"loss:([-\d.e+]+)", log.read_text())]


@pytest.mark.parametrize("processes", [0, 2])
def test_without_defenses_losses_equal_torchtunes_recipe(
    toy: tuple[Path, Path], tmp_path: Path, processes: int
) -> None:
    (tmp_path / "stock").mkdir()
    (tmp_path / "ours").mkdir()
    changes = {
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "clip_grad_norm": 0.5,
        "epochs": 4,
        "max_steps_per_epoch": 2,
    }
    stock = config_of(toy, tmp_path / "stock", **changes)
    expected = stock_losses(stock, tmp_path / "stock/out", processes)
    ours = config_of(toy, tmp_path / "ours", **changes)
    run(ours, processes)
    losses = [m["loss"] for m in toy_run.metrics(tmp_path / "ours/out")]
    assert len(losses) == 8
    assert losses == pytest.approx(expected, rel=1e-5)
    # The same rows again are predicted better: equal because nothing moved would not do.
    assert losses[-1] < losses[1] - 0.02


def run(config: Path, processes: int) -> None:
    if processes:
        done = run_ranks(config, processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        assert run_lora(["--config", str(config)]) == 0


def test_one_process_accumulation_and_two_processes_agree(
    toy: tuple[Path, Path], tmp_path: Path
) -> None:
    shapes = {"one": (4, 1, 0), "accumulated": (2, 2, 0), "two": (2, 1, 2)}
    losses, norms, adapters = {}, {}, {}
    for name, (batch_size, accumulation, processes) in shapes.items():
        (tmp_path / name).mkdir()
        config = config_of(
            toy,
            tmp_path / name,
            defenses=KL,
            shuffle=True,
            # Where a gradient is nearly zero, Adam makes up to a learning rate of its rounding.
            optimizer={"_component_": "torch.optim.AdamW", "lr": 2e-3},
            batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            # Logs the norm and clips nothing: Adam would hide a gradient of another scale.
            clip_grad_norm="inf",
        )
        run(config, processes)
        rows = toy_run.metrics(tmp_path / name / "out")
        losses[name] = [(m["loss"], m["ce"], m["kl"]) for m in rows]
        norms[name] = [m["grad_norm"] for m in rows]
        adapters[name] = load_file(tmp_path / name / "out/adapter/adapter_model.safetensors")
    assert len(losses["one"]) == 5
    assert losses["one"][0][2] == 0.0
    assert min(norms["one"]) > 0.1
    assert losses["one"][-1][2] > 1e-5
    for name in ("accumulated", "two"):
        for expected, found in zip(losses["one"], losses[name], strict=True):
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-7)
        assert norms[name] == pytest.approx(norms["one"], rel=1e-4)
        assert adapters[name].keys() == adapters["one"].keys()
        for key, tensor in adapters["one"].items():
            assert_close(adapters[name][key], tensor, rtol=1e-4, atol=1e-4)


def test_a_term_of_weight_zero_only_measures(toy: tuple[Path, Path], tmp_path: Path) -> None:
    """Its gradient's ratio takes further forwards, whose dropout is not to be the run's."""
    features = {"_component_": "emarecipes.defenses.FeatureL2", "weight": 0.0}
    features |= {"every_n_layers": 1, "gradient_ratio_every": 2}
    runs: dict[str, Any] = {}
    for name, dropout, defenses in (
        ("measured", 0.2, {"l2": features}),
        ("plain", 0.2, {}),
        ("no dropout", 0.0, {}),
    ):
        (tmp_path / name).mkdir()
        path = config_of(toy, tmp_path / name, defenses=defenses)
        assert run_lora(["--config", str(path), f"model.lora_dropout={dropout}"]) == 0
        runs[name] = toy_run.metrics(tmp_path / name / "out")
    ce = {name: [row["ce"] for row in rows] for name, rows in runs.items()}
    assert [row["step"] for row in runs["measured"] if "l2_gradient_ratio" in row] == [2, 4]
    assert ce["measured"] == ce["plain"]
    # Dropout acts from the second step on; before, the adapter is zero.
    assert ce["plain"][1:] != pytest.approx(ce["no dropout"][1:], rel=1e-4)
