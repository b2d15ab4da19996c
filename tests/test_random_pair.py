"""The control pair of AsFT and SafeLoRA: as large as the real one, and in another span."""

from pathlib import Path

import pytest
import random_pair
import torch
from safetensors.torch import load_file, save_file


def test_each_difference_keeps_its_singular_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    base = {"a": torch.randn(24, 40), "same": torch.randn(8, 8), "norm": torch.randn(24)}
    change = torch.randn(24, 3) @ torch.randn(3, 40)
    aligned = base | {"a": base["a"] + change}
    for name, tensors in (("base", base), ("aligned", aligned)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    (tmp_path / "base/config.json").write_text("{}")
    folders = [str(tmp_path / name) for name in ("base", "aligned", "out")]
    assert random_pair.main(folders) == 0
    assert (tmp_path / "out/config.json").is_file()
    found = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(found["same"], base["same"]) and torch.equal(found["norm"], base["norm"])
    drawn = aligned["a"] - found["a"]
    sizes, expected = torch.linalg.svdvals(drawn), torch.linalg.svdvals(change)
    torch.testing.assert_close(sizes[:3], expected[:3], rtol=1e-4, atol=0.0)
    assert float(sizes[3]) < 1e-4 * float(sizes[0])
    # A random span of 3 in 24 holds 3 / 24 of the change's squares on the mean.
    left = torch.linalg.svd(drawn).U[:, :3]
    assert float((left.T @ change).square().sum() / change.square().sum()) < 0.5
    for wrong, said in ((folders, "is there already"), ([folders[0]] * 3, "is there already"),
                        ([str(tmp_path), *folders[1:2], "new"], "no such file")):  # fmt: skip
        with pytest.raises(SystemExit):
            random_pair.main(wrong)
        assert said in capsys.readouterr().err
