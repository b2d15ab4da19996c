"""The minimal loop's losses are the recipe's."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import toy_run
from omegaconf import OmegaConf

from emarecipes.training import run_lora

EXAMPLE = toy_run.REPO / "examples/minimal_kl.py"
spec = importlib.util.spec_from_file_location("minimal_kl", EXAMPLE)
assert spec is not None and spec.loader is not None
minimal_kl: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(minimal_kl)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("toy")
    model = toy_run.write_toy_model(folder / "model", model_dir)
    rows = toy_run.write_rows(folder / "rows.jsonl", 14)
    return toy_run.toy_config(model, rows, folder / "out") | {
        "defenses": {"kl": {"_component_": "emarecipes.defenses.KLToReference", "weight": 0.5}},
        "shuffle": True,
        "clip_grad_norm": 0.5,
        "epochs": 2,
        "max_steps_per_epoch": None,
    }


def test_losses_equal_the_recipes(config: dict[str, Any], tmp_path: Path) -> None:
    found = list(minimal_kl.train(OmegaConf.create(config)))
    assert run_lora(["--config", str(toy_run.write_config(tmp_path / "c.yaml", config))]) == 0
    expected = toy_run.metrics(Path(config["output_dir"]))
    assert len(found) == len(expected) == 6
    for step, line in zip(expected, found, strict=True):
        assert line == pytest.approx({key: step[key] for key in line}, rel=1e-5, abs=1e-7)
    # The term acts: it is weighed against cross entropy, and grows from 0.
    assert found[0]["kl"] == 0.0
    assert found[-1]["kl"] > 1e-4


@pytest.mark.parametrize(
    "override",
    [
        "gradient_accumulation_steps=2",
        "group_by_length=true",
        "init_adapter=runs/x/adapter",
        "dataset.safe.source=json",
        "defenses.kl.direction=symmetric",
        "defenses.kl.every_n_batches=2",
        "defenses.l2._component_=emarecipes.defenses.FeatureL2",
    ],
)
def test_what_is_not_written_out_is_refused(config: dict[str, Any], override: str) -> None:
    changed = OmegaConf.merge(OmegaConf.create(config), OmegaConf.from_dotlist([override]))
    with pytest.raises(SystemExit, match="error: "):
        next(minimal_kl.train(changed))
