"""A checkpoint's files: damage of every kind is seen, and a failed write loses nothing."""

import resource
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from emarecipes.errors import UserError
from emarecipes.training.checkpoint import (
    Counters,
    checkpoint_steps,
    newest_checkpoint,
    read_checkpoint,
    write_checkpoint,
)

FILES = ("adapter.safetensors", "training.pt", "run.json", "SHA256SUMS")


def write(folder: Path, step: int, **training: Any) -> Path:
    adapter = {"layers.0.lora_a.weight": torch.full((64, 64), float(step))}
    stored = {"random": [torch.get_rng_state()], "optimizer": {"state": {}}} | training
    return write_checkpoint(folder, adapter, stored, {"config": {"seed": 1}}, Counters(step=step))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    moments = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(5)}}}
    path = write(tmp_path, 3, optimizer=moments)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.path == path == tmp_path / "step_3"
    assert found.counters == Counters(step=3)
    assert found.adapter()["layers.0.lora_a.weight"].equal(torch.full((64, 64), 3.0))
    read = found.training()["optimizer"]["state"][0]
    assert read["exp_avg"].equal(moments["state"][0]["exp_avg"])
    assert sorted(p.name for p in path.iterdir()) == sorted(FILES)
    assert len({p.stat().st_mode for p in path.iterdir()}) == 1
    done = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=path)
    assert done.returncode == 0


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [truncate, empty, flip, Path.unlink], ids=lambda f: f.__name__)
def test_a_damaged_file_is_seen_and_the_one_before_taken(
    tmp_path: Path, name: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    for step in (2, 4):
        write(tmp_path, step)
    damage(tmp_path / "step_4" / name)
    with pytest.raises(UserError, match="step_4"):
        read_checkpoint(tmp_path / "step_4")
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.counters.step == 2
    damage(tmp_path / "step_2" / name)
    with pytest.raises(UserError, match="none of the 2 checkpoint"):
        newest_checkpoint(tmp_path)


def test_every_single_flipped_byte_is_seen(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    for name in ("run.json", "SHA256SUMS"):
        whole = (path / name).read_bytes()
        for index in range(len(whole)):
            (path / name).write_bytes(
                whole[:index] + bytes([whole[index] ^ 0x10]) + whole[index + 1 :]
            )
            with pytest.raises(UserError):
                read_checkpoint(path)
        (path / name).write_bytes(whole)
    read_checkpoint(path)
    (path / "more").write_text("")
    with pytest.raises(UserError, match="checksums"):
        read_checkpoint(path)


def test_no_room_is_found_out_before_writing(tmp_path: Path) -> None:
    write(tmp_path, 1)
    huge = torch.empty(2**48, device="meta")
    with pytest.raises(UserError, match=r"checkpoint of step 2 not written: it needs .* MiB free"):
        write(tmp_path, 2, optimizer=huge)
    assert [p.name for p in tmp_path.iterdir()] == ["step_1"]


# Below the size of the adapter's file, of training.pt, of run.json: each write fails in turn.
@pytest.mark.parametrize("limit", [8000, 16500, 300])
def test_a_write_that_fails_loses_nothing(tmp_path: Path, limit: int) -> None:
    write(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(UserError, match="checkpoint of step 2 not written"):
            write(tmp_path, 2, random=[torch.zeros(40_000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == ["step_1"]
    assert read_checkpoint(tmp_path / "step_1").counters.step == 1


def test_what_only_unsafe_unpickling_gives_back_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not written"):
        write(tmp_path, 1, scheduler=Path("x"))
    assert not checkpoint_steps(tmp_path)


def test_leftovers_of_a_killed_write_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".step_1.partial").mkdir()
    (tmp_path / ".step_1.partial/adapter.safetensors").write_text("half")
    write(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step_2"]
