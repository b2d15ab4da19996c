"""`freeze_after`: the layers behind keep their adapter, whatever trains, and are saved as it is."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_defenses
import toy_run
from ranks import run_ranks
from torch.testing import assert_close
from toy_defended import assert_same, template_toy, train, trained, write_defended

from emarecipes.training import run_lora

# One reads hidden states, two add gradients to the matrices themselves, one runs on its own tokens.
NAMES = ["asft", "block", "prefix", "spectral"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("toy")
    toy = template_toy(folder)
    toy["config"]["optimizer"]["weight_decay"] = 0.5
    toy["config"] |= {"freeze_after": 1, "max_steps_per_epoch": 3}
    later = toy_defenses.later_entries(folder, toy["model"], toy_run.LAYERS, toy_run.WIDTH)
    toy["defenses"] |= later
    return toy


def behind(adapter: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {name: tensor for name, tensor in adapter.items() if ".layers.1." in name}
    assert 2 * len(found) == len(adapter)
    return found


def test_only_the_layers_before_are_trained(
    toy: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        rows, adapter = train(write_defended(toy, tmp_path / "frozen", NAMES))
    (said,) = (m for m in caplog.messages if m.startswith("freeze_after: "))
    total = sum(tensor.numel() for tensor in adapter.values())
    assert said == (
        f"freeze_after: {total // 2:,} of the adapter's {total:,} parameters are trained, those "
        "of the first 1 layers"
    )
    _, shorter = train(write_defended(toy, tmp_path / "shorter", NAMES, max_steps_per_epoch=1))
    free, whole = train(write_defended(toy, tmp_path / "free", NAMES, freeze_after=None))
    assert rows[0]["loss"] == free[0]["loss"] and rows[2]["loss"] != free[2]["loss"]
    for name, tensor in behind(adapter).items():
        assert torch.equal(tensor, shorter[name]), name
        assert not torch.equal(tensor, whole[name]), name
        assert bool(tensor.any()) == ("lora_A" in name), name
    assert all(not torch.equal(adapter[n], shorter[n]) for n in adapter.keys() - behind(adapter))


def test_an_adapter_that_was_there_stays(toy: dict[str, Any], tmp_path: Path) -> None:
    _, before = train(write_defended(toy, tmp_path / "before", [], freeze_after=None))
    given = {"init_adapter": str(tmp_path / "before/out/adapter")}
    _, after = train(write_defended(toy, tmp_path / "after", NAMES, **given))
    for name, tensor in behind(before).items():
        assert tensor.any()
        assert_close(after[name], tensor, rtol=1e-6, atol=0.0, msg=name)
    assert all(not torch.equal(after[n], before[n]) for n in before.keys() - behind(before))


def test_a_projection_leaves_them_too(toy: dict[str, Any], tmp_path: Path) -> None:
    _, before = train(write_defended(toy, tmp_path / "before", [], freeze_after=None))
    given = {"init_adapter": str(tmp_path / "before/out/adapter"), "max_steps_per_epoch": 1}
    _, plain = train(write_defended(toy, tmp_path / "plain", [], **given))
    config = write_defended(toy, tmp_path / "projected", ["safelora"], **given)
    _, after = train(config)
    for name, tensor in behind(before).items():
        assert_close(after[name], tensor, rtol=1e-6, atol=0.0, msg=name)
    assert any(not torch.equal(after[n], plain[n]) for n in before.keys() - behind(before))
    done = run_ranks(write_defended(toy, tmp_path / "two", ["safelora"], **given, batch_size=2))
    assert done.returncode == 0, done.stderr[-3000:]
    for name, tensor in trained(tmp_path / "two")[1].items():
        assert_close(tensor, after[name], rtol=1e-4, atol=1e-4, msg=name)


def test_two_processes_and_a_resumed_run_are_the_run_of_one(
    toy: dict[str, Any], tmp_path: Path
) -> None:
    every = {"save_every_n_steps": 2}
    one = train(write_defended(toy, tmp_path / "one", NAMES, **every))
    again = write_defended(toy, tmp_path / "again", NAMES, **every)
    found = train(again, f"resume={tmp_path / 'one/out/checkpoints/step_2'}")
    assert found[0][-1] == one[0][-1]
    assert all(torch.equal(tensor, found[1][key]) for key, tensor in one[1].items())
    two = write_defended(toy, tmp_path / "two", NAMES, batch_size=2)
    done = run_ranks(two)
    assert done.returncode == 0, done.stderr[-3000:]
    other = trained(tmp_path / "two")
    for row in (*one[0], *other[0]):
        row.pop("padding_share")
        row.pop("block_rise", None)  # Of the first process's last micro-batch.
    assert_same(one, other)
    assert all(torch.equal(t, behind(one[1])[name]) for name, t in behind(other[1]).items())


def test_no_layer_is_left_out_or_all(
    toy: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_defended(toy, tmp_path, [], freeze_after=2)
    assert run_lora(["--config", str(config)]) == 1
    assert "freeze_after: must be from 1 to 1, as the model has 2 layers" in capsys.readouterr().err
