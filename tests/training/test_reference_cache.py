"""The reference cache: the uncached run's numbers, and when it is used."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_run
from ranks import run_ranks
from torchtune.modules import TransformerDecoder
from toy_cache import FEATURES, assert_identical, cached_config, train, trained, write

from emarecipes.training import run_cache, run_lora
from emarecipes.training.checked import CheckedRun


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> dict[str, Any]:
    return cached_config(tmp_path_factory.mktemp("toy"), model_dir)


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each forward of the model.

    There are none to compare gradients at the end of a short run, but where a defense asks for it.
    """
    monkeypatch.setattr("emarecipes.training.gradients.SHORTEST_RUN", 10)
    counted: list[int] = []
    forward = TransformerDecoder.forward

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        counted.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(TransformerDecoder, "forward", counting)
    return counted


@pytest.mark.parametrize(
    ("dtype", "stored_as", "defenses"),
    [
        ("fp32", None, {"kl": {}, "feature_l2": {}, "persona": {}}),
        ("fp32", "fp32", {"kl": {"tokens": "all"}, "feature_l2": {"samples": "safe"}}),
        ("bf16", None, {"kl": {"samples": "safe"}, "feature_l2": {"preset": "ema_rl"}}),
        ("bf16", "fp32", {"kl": {}}),
        ("fp32", None, {"feature_l2": {"preset": "ldifs", "skip_first_token": True}}),
    ],
)
def test_an_empty_and_a_full_cache_give_the_uncached_run_bit_for_bit(
    toy: dict[str, Any],
    tmp_path: Path,
    forwards: list[int],
    dtype: str,
    stored_as: str | None,
    defenses: dict[str, Any],
) -> None:
    entries = {name: toy["defenses"][name] | change for name, change in defenses.items()}
    for entry in entries.values():
        if entry.get("preset"):
            entry.pop("every_n_layers")
            entry["num_layers"] = 2
    runs: dict[str, Any] = {"defenses": entries, "dtype": dtype}
    cached = runs | {"reference_cache": str(tmp_path / "cache"), "reference_cache_dtype": stored_as}
    uncached = train(toy, tmp_path / "a", **runs)
    without = len(forwards)
    forwards.clear()
    assert_identical(uncached, train(toy, tmp_path / "b", **cached))
    empty = len(forwards)
    forwards.clear()
    assert_identical(uncached, train(toy, tmp_path / "c", **cached))
    full = len(forwards)
    # Four steps of two micro-batches; in two of them gradients are compared, by two more forwards
    # of each micro-batch, of which cross entropy's needs no reference.
    backwards = 8 + (8 if "feature_l2" in entries else 0)
    references = 8 + (4 if "feature_l2" in entries else 0)
    assert (without, full) == (backwards + references, backwards)
    if entries.get("kl", {}).get("samples") != "safe":
        assert empty == backwards + 4
    assert uncached[0][3].get("kl", 1) > 0


def test_other_batches_than_when_it_was_filled(
    toy: dict[str, Any], tmp_path: Path, forwards: list[int]
) -> None:
    """In fp32 the losses of the second, reshuffled epoch are the uncached run's within 1e-4."""
    changes: dict[str, Any] = {"shuffle": True, "max_steps_per_epoch": None, "epochs": 2}
    defenses = toy["defenses"] | {"feature_l2": FEATURES | {"gradient_ratio_every": 0}}
    changes |= {"defenses": defenses, "gradient_accumulation_steps": 1, "batch_size": 4}
    config = write(toy, tmp_path / "a", **changes)
    rows = CheckedRun(["--config", config], 1, 0).rows
    first, second = (rows.steps(4, seed=7, epoch=epoch, shuffle=True) for epoch in (0, 1))
    assert len(first) == 4 and not set(map(frozenset, first)) & set(map(frozenset, second))
    uncached, _ = train(toy, tmp_path / "a", **changes)
    forwards.clear()
    cached, _ = train(toy, tmp_path / "b", **changes, reference_cache=str(tmp_path / "cache"))
    assert len(forwards) == 4 + 2 * 4, "the reference ran in the first epoch alone"
    for expected, found in zip(uncached, cached, strict=True):
        for name in ("loss", "ce", "kl", "feature_l2"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-7)


def test_a_disk_that_refuses_a_row_costs_only_the_cache(
    toy: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Three rows of two writes each, then none: the run says so once, and its numbers are exact."""
    uncached = train(toy, tmp_path / "a")
    written: list[int] = []
    write_at = os.pwrite

    def pwrite(file: int, data: Any, offset: int) -> int:
        if len(written) == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(offset)
        return write_at(file, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    changes = {"reference_cache": str(tmp_path / "cache")}
    assert_identical(uncached, train(toy, tmp_path / "b", **changes))
    said = "Reference cache: nothing more is stored: No space left on device"
    assert caplog.messages.count(said) == 1
    (folder,) = (tmp_path / "cache").iterdir()
    assert (np.fromfile(folder / "marks.bin", np.uint64) != 0).sum() == 3
    monkeypatch.undo()
    assert_identical(uncached, train(toy, tmp_path / "c", **changes))
    assert (np.fromfile(folder / "marks.bin", np.uint64) != 0).sum() == 8


def test_half_the_size_in_bf16_and_near(toy: dict[str, Any], tmp_path: Path) -> None:
    sizes = {}
    runs = {}
    for stored_as in ("fp32", "bf16"):
        cache = tmp_path / f"cache_{stored_as}"
        changes = {"reference_cache": str(cache), "reference_cache_dtype": stored_as}
        runs[stored_as] = train(toy, tmp_path / stored_as, **changes)
        again = train(toy, tmp_path / f"{stored_as}_again", **changes)
        assert_identical(runs[stored_as], again)
        (states,) = cache.glob("*/states.bin")
        sizes[stored_as] = states.stat().st_size
    assert sizes["fp32"] == 2 * sizes["bf16"] > 0
    exact, rounded = (runs[name][0][-1] for name in ("fp32", "bf16"))
    assert exact["ce"] == pytest.approx(rounded["ce"], rel=1e-2)
    assert exact["kl"] != rounded["kl"]


def test_rows_that_are_missing_or_broken_are_computed_again(
    toy: dict[str, Any], tmp_path: Path, forwards: list[int]
) -> None:
    changes = {"reference_cache": str(tmp_path / "cache")}
    expected = train(toy, tmp_path / "a", **changes)
    (folder,) = (tmp_path / "cache").iterdir()
    marks = np.memmap(folder / "marks.bin", np.uint64, "r+")
    assert (marks != 0).sum() == 8  # Two of the three steps of an epoch were asked for.
    before = marks.copy()
    marks[marks.nonzero()[0][3]] = 0
    marks[marks.nonzero()[0][0]] ^= np.uint64(1)
    marks.flush()
    forwards.clear()
    assert_identical(expected, train(toy, tmp_path / "b", **changes))
    assert 16 < len(forwards) <= 18
    assert (np.fromfile(folder / "marks.bin", np.uint64) == before).all()


def test_filled_ahead_over_two_processes(
    toy: dict[str, Any], tmp_path: Path, forwards: list[int]
) -> None:
    """The batches of two processes are those of one with two micro-batches."""
    plain = train(toy, tmp_path / "a")
    cache = {"reference_cache": str(tmp_path / "cache")}
    config = Path(write(toy, tmp_path / "b", gradient_accumulation_steps=1, **cache))
    done = run_ranks(config, recipe="recipes/ema_cache.py")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "b/out/metrics.jsonl").exists()
    (folder,) = (tmp_path / "cache").iterdir()
    marks = np.memmap(folder / "marks.bin", np.uint64, "r+")
    assert (marks != 0).all()
    forwards.clear()
    rows, _ = train(toy, tmp_path / "c", **cache)
    assert len(forwards) == 16
    for expected, found in zip(plain[0], rows, strict=True):
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-7)
    # One process lacks a row, so both compute; the losses stay those of one process.
    marks[0] = 0
    marks.flush()
    config = Path(write(toy, tmp_path / "d", gradient_accumulation_steps=1, **cache))
    done = run_ranks(config)
    assert done.returncode == 0, done.stderr
    assert marks[0] != 0
    for expected, found in zip(plain[0], trained(tmp_path / "d")[0], strict=True):
        for row in (expected, found):
            row.pop("persona_ratio", 0)  # Of one micro-batch, of each process or of one.
        found.pop("kl_gradient_ratio", 0)  # In a short run's last step; see `forwards`.
        assert found == pytest.approx(expected, rel=1e-4, abs=2e-6)


HASHING = """
import sys
import torch.distributed as dist
from emarecipes.training import reference_cache_open, run_cache

def fingerprint(cfg, quiet):
    print("hashed by", dist.get_rank())
    if cfg.seed == 13:
        raise OSError("a file that cannot be read")
    return {}

reference_cache_open._weights_fingerprint = fingerprint
sys.exit(run_cache(sys.argv[1:]))
"""


def test_only_the_first_of_two_processes_reads_the_weights(
    toy: dict[str, Any], tmp_path: Path
) -> None:
    script = tmp_path / "hashing.py"
    script.write_text(HASHING)
    config = Path(write(toy, tmp_path / "a", reference_cache=str(tmp_path / "cache")))
    done = run_ranks(config, recipe=str(script))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("hashed by") == done.stdout.count("hashed by 0") == 1
    (folder,) = (tmp_path / "cache").iterdir()
    assert (np.fromfile(folder / "marks.bin", np.uint64) != 0).all()
    # What stops the first stops both.
    done = run_ranks(config, "seed=13", recipe=str(script))
    assert done.returncode == 1
    assert toy_run.error_lines(done) == ["error: a file that cannot be read"]


def test_the_rows_that_an_epoch_leaves_out_are_stored_too(
    toy: dict[str, Any], tmp_path: Path, forwards: list[int]
) -> None:
    config = write(
        toy,
        tmp_path / "a",
        reference_cache=str(tmp_path / "cache"),
        batch_size=3,
        dataset=toy["dataset"]["task"],
        gradient_accumulation_steps=1,
        shuffle=True,
    )
    rows = CheckedRun(["--config", config, "batch_size=5"], 1, 0).rows
    steps = rows.covering_steps(5, seed=7, shuffle=True)
    assert steps[:2] == rows.steps(5, seed=7, epoch=0, shuffle=True)
    assert [len(step) for step in steps] == [5, 5, 5]
    assert {row for step in steps for row in step} == set(range(12))
    assert run_cache(["--config", config, "batch_size=5"]) == 0
    assert len(forwards) == 3
    # Other batches: four steps, and two comparisons of gradients, all without a reference.
    assert run_lora(["--config", config]) == 0
    assert len(forwards) == 3 + 4 + 4
