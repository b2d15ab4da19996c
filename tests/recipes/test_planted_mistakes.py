"""Mistakes that published defenses were found with, planted here: each is refused or seen.

Where a run alone cannot know, what must be the same of two runs (however rows are padded, however
a step is split) is shown to differ with the mistake, and not without it.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from toy_defended import assert_same, defended_toy, train, without_parts, write_defended

from emarecipes.defenses import FeatureL2
from emarecipes.training import run_lora
from emarecipes.training.step import TrainingLoss


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> dict[str, Any]:
    toy = defended_toy(tmp_path_factory.mktemp("toy"), model_dir)
    toy["config"] |= {"shuffle": False, "max_steps_per_epoch": 3}
    toy["config"]["lr_scheduler"]["num_warmup_steps"] = 0
    toy["defenses"]["feature_l2"].pop("gradient_ratio_every")
    return toy


def test_features_under_no_grad(
    toy: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    original = FeatureL2.hidden_term

    def without_gradient(self: FeatureL2, *arguments: Any) -> torch.Tensor:
        with torch.no_grad():
            return original(self, *arguments)

    monkeypatch.setattr(FeatureL2, "hidden_term", without_gradient)
    config = write_defended(toy, tmp_path / "a", ["feature_l2"])
    assert run_lora(["--config", str(config)]) == 1
    (line,) = [x for x in capfd.readouterr().err.splitlines() if x.startswith("error: ")]
    assert "defenses.feature_l2: what hidden_term returns carries no gradient" in line
    assert not (config.parent / "out/adapter").exists()


def test_names_that_do_not_match_once_layers_are_wrapped(
    toy: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    users: dict[str, Any] = {"defenses": {"users": {"_component_": "toy_mishaps.ByName"}}}
    users |= {"max_steps_per_epoch": 4, "epochs": 3}
    warning = "step 10: the gradient of defenses.users is 0"
    rows, _ = train(write_defended(toy, tmp_path / "plain", [], **users))
    assert rows[9]["users_gradient_ratio"] > 0 and warning not in caplog.text
    users["enable_activation_checkpointing"] = True
    train(write_defended(toy, tmp_path / "wrapped", [], **users))
    assert warning in caplog.text


def test_a_mean_over_padding(
    toy: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def runs(name: str) -> list[Any]:
        return [
            train(
                write_defended(toy, tmp_path / f"{name}{m}", ["feature_l2"], pad_to_multiple_of=m)
            )
            for m in (1, 160)
        ]

    def everywhere(self: FeatureL2, batch: Any) -> torch.Tensor:
        return torch.ones_like(batch.labelled_BS)

    one, other = without_padding(runs("right"))
    assert_same(one, other)
    monkeypatch.setattr(FeatureL2, "positions", everywhere)
    with pytest.raises(AssertionError):
        assert_same(*without_padding(runs("planted")))


def without_padding(runs: list[Any]) -> list[Any]:
    for rows, _ in runs:
        for row in rows:
            row.pop("padding_share")
    return runs


def test_a_loss_that_accumulation_scales(
    toy: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each micro-batch's own mean, whatever part of the step's tokens it has."""
    split = {"gradient_accumulation_steps": 2, "batch_size": 2}

    def run(name: str, **changes: Any) -> Any:
        config = write_defended(toy, tmp_path / name, ["kl"], pad_to_multiple_of=96, **changes)
        rows, adapter = train(config)
        without_parts(rows)
        return rows, adapter

    whole = run("whole")
    assert_same(whole, run("right", **split))
    original = TrainingLoss.backward

    def by_its_own(self: TrainingLoss, batch: Any, counts: Any, *more: Any, **named: Any) -> Any:
        return original(self, batch, 2 * self.counts([batch]), *more, **named)

    monkeypatch.setattr(TrainingLoss, "backward", by_its_own)
    with pytest.raises(AssertionError):
        assert_same(whole, run("planted", **split))
