"""Differences of two folders' tensors: float32, whatever they are stored in."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from emarecipes.errors import UserError
from emarecipes.weights_folder import Difference, WeightsFolder


def write(folder: Path, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"small": (3, 5), "large": (40, 7), "wide": (2, 90)}
    tensors = {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return tensors


def test_differences_of_several_sizes_and_precisions(tmp_path: Path) -> None:
    """Also where torch makes bf16 by default, as within a run."""
    aligned = write(tmp_path / "aligned", torch.bfloat16, 0)
    base = write(tmp_path / "base", torch.float32, 1)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        difference = Difference(
            WeightsFolder(tmp_path / "aligned"), WeightsFolder(tmp_path / "base")
        )
        for name in ("small", "large", "wide", "small"):
            expected = aligned[name].double() - base[name].double()
            found = difference(name)
            assert found.dtype == torch.float32
            assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)
    finally:
        torch.set_default_dtype(previous)


def test_a_tensor_of_two_files_is_refused(tmp_path: Path) -> None:
    """Which one is meant cannot be told: the last by name is not what a checkpointer reads."""
    write(tmp_path / "model", torch.float32, 0)
    other = {"large": torch.zeros(40, 7)}
    save_file(other, tmp_path / "model" / "old.safetensors")
    with pytest.raises(UserError, match=r"model.safetensors and old.safetensors both have large"):
        WeightsFolder(tmp_path / "model")


@pytest.mark.parametrize(("dtype", "name"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_quantized_weights_are_refused(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    """Their scales stand elsewhere: the numbers alone are another model's."""
    write(tmp_path / "model", dtype, 0)
    with pytest.raises(UserError, match=f"small is stored as {name}, which is of quantized"):
        WeightsFolder(tmp_path / "model").shape("small")


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ("{", "index.json: cannot be read: Expecting property name"),
        ("{}", "index.json: weight_map must give the name of a file for each tensor"),
        ("[]", "index.json: weight_map must give"),
        ('{"weight_map": {"small": 1}}', "index.json: weight_map must give"),
    ],
)
def test_an_index_that_is_none(tmp_path: Path, index: str, reason: str) -> None:
    write(tmp_path / "model", torch.float32, 0)
    (tmp_path / "model/model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=reason):
        WeightsFolder(tmp_path / "model")


def test_an_index_that_lies(tmp_path: Path) -> None:
    tensors: dict[str, Any] = write(tmp_path / "model", torch.float32, 0)
    files = dict.fromkeys([*tensors, "more"], "model.safetensors")
    index = tmp_path / "model/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    weights = WeightsFolder(tmp_path / "model")
    assert weights.shape("small") == (3, 5)
    with pytest.raises(UserError, match=r"model.safetensors: has no more, which the index says"):
        weights.shape("more")
