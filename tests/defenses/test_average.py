"""The adapter's average against the formula's sums in float64, from adapters on disk."""

from pathlib import Path
from typing import Any

import fuzz_cases
import pytest
import torch
from safetensors.torch import load_file
from toy_defended import defended_toy, train, write_defended

from emarecipes.defenses import AdapterEMA
from emarecipes.errors import UserError

DECAY = 0.8


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("toy")
    tokenizer = fuzz_cases.write_toy_tokenizer(folder / "tokenizer")
    toy = defended_toy(folder, tokenizer, fuzz_cases.VOCABULARY)
    # A rate that knows nothing of the run's length: a shorter run is a longer one's beginning.
    toy["config"] |= {"lr_scheduler": None}
    toy["config"]["tokenizer"]["max_seq_len"] = 256
    toy["defenses"]["average"] = {"_component_": "emarecipes.defenses.AdapterEMA", "decay": DECAY}
    toy["defenses"]["safelora"] |= {"every_n_steps": 1}
    return toy


def test_it_is_the_weighted_mean_of_the_adapters_after_each_step(
    toy: dict[str, Any], tmp_path: Path
) -> None:
    """Also of projected ones, though the projection's name comes after the average's."""
    after: list[dict[str, torch.Tensor]] = []
    for steps in (1, 2, 3):
        config = write_defended(toy, tmp_path / f"{steps}", ["safelora"], max_steps_per_epoch=steps)
        after.append(train(config)[1])
    both = ["average", "safelora"]
    config = write_defended(toy, tmp_path / "averaged", both, max_steps_per_epoch=3)
    rows, adapter = train(config)
    assert all(torch.equal(tensor, adapter[key]) for key, tensor in after[-1].items())
    found = load_file(tmp_path / "averaged/out/adapter_average/adapter_model.safetensors")
    assert found.keys() == adapter.keys()
    distance = norm = 0.0
    for key, tensor in found.items():
        one, two, three = (each[key].double() for each in after)
        expected = (DECAY**2 * one + DECAY * two + three) / (DECAY**2 + DECAY + 1)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-8)
        assert tensor.dtype == torch.float32
        distance += float((three - expected).square().sum())
        norm += float(three.square().sum())
    assert distance > 0
    assert rows[0]["average_distance"] == 0
    assert rows[-1]["average_distance"] == pytest.approx((distance / norm) ** 0.5, rel=1e-5)
    one, other = (
        (tmp_path / f"averaged/out/{name}/adapter_config.json").read_text()
        for name in ("adapter", "adapter_average")
    )
    assert one == other


def test_a_run_that_replaces_one_leaves_no_older_average(
    toy: dict[str, Any], tmp_path: Path
) -> None:
    short = {"max_steps_per_epoch": 1}
    train(write_defended(toy, tmp_path / "a", ["average"], **short))
    of_the_user = tmp_path / "a/out/adapter_copy"
    of_the_user.mkdir()
    train(write_defended(toy, tmp_path / "a", [], **short), "overwrite=true")
    assert not (tmp_path / "a/out/adapter_average").exists() and of_the_user.is_dir()


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5, 1.5, float("nan")])
def test_a_decay_that_averages_nothing_is_refused(decay: float) -> None:
    with pytest.raises(UserError, match="decay must be above 0 and below 1"):
        AdapterEMA(decay)
