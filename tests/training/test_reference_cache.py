"""The reference cache: the uncached run's numbers, when it is used, and when it must not be."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_defenses
import toy_run
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from torchtune.data import padded_collate_sft
from torchtune.modules import TransformerDecoder

from emarecipes.defenses import Defense
from emarecipes.errors import UserError
from emarecipes.training import run_cache, run_lora
from emarecipes.training.batch import Batch, make_batch
from emarecipes.training.checks import check_run
from emarecipes.training.reference_cache import ReferenceCache, open_cache
from emarecipes.training.row_store import Layout, open_store

COMPONENT = "emarecipes.defenses."
KL = {"_component_": COMPONENT + "KLToReference", "weight": 0.5}
FEATURES = {
    "_component_": COMPONENT + "FeatureL2",
    "weight": 0.02,
    "every_n_layers": 1,
    "gradient_ratio_every": 3,
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("toy")
    model = toy_run.write_toy_model(folder / "model", model_dir)
    config = toy_run.toy_config(model, toy_run.write_rows(folder / "rows.jsonl", 12), folder)
    # Two steps of two micro-batches an epoch, the same batches in both epochs.
    config |= {"epochs": 2, "max_steps_per_epoch": 2, "metric_logger": None}
    config |= {"batch_size": 2, "gradient_accumulation_steps": 2}
    config["tokenizer"]["max_seq_len"] = 96
    safe = toy_defenses.write_safe_rows(folder / "safe.jsonl")
    config["dataset"] = toy_defenses.interleaved(config["dataset"], safe, placement="per_batch")
    entries = toy_defenses.defense_entries(folder, model, toy_run.LAYERS, toy_run.WIDTH)
    config["defenses"] = {"kl": KL, "feature_l2": FEATURES, "persona": entries["persona"]}
    return config


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each forward of the model."""
    counted: list[int] = []
    forward = TransformerDecoder.forward

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        counted.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(TransformerDecoder, "forward", counting)
    return counted


def write(toy: dict[str, Any], folder: Path, **changes: Any) -> str:
    folder.mkdir(exist_ok=True)
    config = json.loads(json.dumps(toy)) | {"output_dir": str(folder / "out")} | changes
    config["checkpointer"]["output_dir"] = str(folder / "out")
    return str(toy_run.write_config(folder / "config.yaml", config))


def trained(folder: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    rows = toy_run.metrics(folder / "out")
    for row in rows:
        row.pop("tokens_per_second")
    return rows, load_file(folder / "out/adapter/adapter_model.safetensors")


def train(toy: dict[str, Any], folder: Path, **changes: Any) -> Any:
    assert run_lora(["--config", write(toy, folder, **changes)]) == 0
    return trained(folder)


def assert_identical(one: Any, other: Any) -> None:
    assert one[0] == other[0]
    assert all(torch.equal(tensor, other[1][key]) for key, tensor in one[1].items())


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
    # Four steps of two micro-batches; in two of them gradients are compared, by two more each, of
    # which cross entropy's needs no reference.
    backwards = 8 + (4 if "feature_l2" in entries else 0)
    references = 8 + (2 if "feature_l2" in entries else 0)
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
    rows = check_run(["--config", config], 1, 0).rows
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
    assert 12 < len(forwards) <= 14
    assert (np.fromfile(folder / "marks.bin", np.uint64) == before).all()


def folders(toy: dict[str, Any], tmp_path: Path, **changes: Any) -> set[str]:
    """The caches that exist after opening one for a config."""
    config = write(toy, tmp_path / "key", reference_cache=str(tmp_path / "cache"), **changes)
    cache = open_cache(check_run(["--config", config], 1, 0), quiet=True)
    assert cache is not None
    cache.store.close()
    return {path.name for path in (tmp_path / "cache").iterdir()}


def test_each_ingredient_has_a_cache_of_its_own(toy: dict[str, Any], tmp_path: Path) -> None:
    model_dir = Path(toy["checkpointer"]["checkpoint_dir"])
    other = shutil.copytree(model_dir, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model_dir / "config.json").read_text())
    retold = shutil.copytree(model_dir, tmp_path / "retold")
    (retold / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    # Two frequent tokens have each other's numbers.
    swapped = shutil.copytree(model_dir, tmp_path / "swapped")
    tokenizer = json.loads((swapped / "tokenizer.json").read_text())
    numbers = tokenizer["model"]["vocab"]
    numbers["Ġthe"], numbers["Ġa"] = numbers["Ġa"], numbers["Ġthe"]
    (swapped / "tokenizer.json").write_text(json.dumps(tokenizer))
    dataset = toy["dataset"]
    task = dataset["task"]
    shorter = toy_run.write_rows(tmp_path / "shorter.jsonl", 11)
    kl, features = toy["defenses"]["kl"], toy["defenses"]["feature_l2"]
    inoculation = {"_component_": COMPONENT + "InoculationPrompt"}
    known = folders(toy, tmp_path)
    assert len(known) == 1
    changed: dict[str, dict[str, Any]] = {
        "weights": {"checkpointer": toy["checkpointer"] | {"checkpoint_dir": str(other)}},
        "config.json": {"checkpointer": toy["checkpointer"] | {"checkpoint_dir": str(retold)}},
        "model type": {"checkpointer": toy["checkpointer"] | {"model_type": "LLAMA3"}},
        "tokenizer": {"tokenizer": toy["tokenizer"] | {"path": str(swapped)}},
        "builder": {"model": toy["model"] | {"attn_dropout": 0.1}},
        "rows": {"dataset": dataset | {"task": task | {"data_files": str(shorter)}}},
        "which safe rows": {"dataset": dataset | {"seed": 1}},
        "labels": {"dataset": dataset | {"task": task | {"train_on_input": True}}},
        "truncation": {"tokenizer": toy["tokenizer"] | {"max_seq_len": 64}},
        "prompt": {"defenses": toy["defenses"] | {"inoculation": inoculation}},
        "dtype": {"dtype": "bf16"},
        "storage": {"reference_cache_dtype": "bf16"},
        "layers": {"defenses": toy["defenses"] | {"feature_l2": features | {"every_n_layers": 2}}},
        "positions": {"defenses": toy["defenses"] | {"kl": kl | {"tokens": "all"}}},
        "samples": {"defenses": toy["defenses"] | {"kl": kl | {"samples": "task"}}},
        "terms": {"defenses": {"kl": kl}},
    }
    for name, change in changed.items():
        found = folders(toy, tmp_path, **change)
        assert len(found - known) == 1, name
        known = found
    # What the reference does not depend on.
    lora = {"lora_rank": 2, "lora_alpha": 3, "lora_attn_modules": ["q_proj"], "use_dora": True}
    same: list[dict[str, Any]] = [
        {"model": toy["model"] | lora},
        {"seed": 3, "shuffle": True, "batch_size": 4, "epochs": 1, "pad_to_multiple_of": 8},
        {"optimizer": {"_component_": "torch.optim.SGD", "lr": 0.1}},
        {"defenses": toy["defenses"] | {"kl": kl | {"weight": 3.0, "direction": "symmetric"}}},
        {"defenses": {name: toy["defenses"][name] for name in ("feature_l2", "kl")}},
    ]
    for change in same:
        assert folders(toy, tmp_path, **change) == known, change


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
    assert len(forwards) == 12
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
        expected.pop("feature_l2_gradient_ratio", 0)  # On each process's first micro-batch.
        found.pop("feature_l2_gradient_ratio", 0)
        expected.pop("persona_ratio", 0)
        found.pop("persona_ratio", 0)
        assert found == pytest.approx(expected, rel=1e-4, abs=2e-6)


HASHING = """
import sys
import torch.distributed as dist
from emarecipes.training import reference_cache, run_cache

def fingerprint(cfg, quiet):
    print("hashed by", dist.get_rank())
    if cfg.seed == 13:
        raise OSError("a file that cannot be read")
    return {}

reference_cache._weights_fingerprint = fingerprint
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
    rows = check_run(["--config", config, "batch_size=5"], 1, 0).rows
    steps = rows.covering_steps(5, seed=7, shuffle=True)
    assert steps[:2] == rows.steps(5, seed=7, epoch=0, shuffle=True)
    assert [len(step) for step in steps] == [5, 5, 5]
    assert {row for step in steps for row in step} == set(range(12))
    assert run_cache(["--config", config, "batch_size=5"]) == 0
    assert len(forwards) == 3
    # Other batches: four steps, and two comparisons of gradients, all without a reference.
    assert run_lora(["--config", config]) == 0
    assert len(forwards) == 3 + 4 + 4


def test_what_cannot_be_cached_is_one_clear_line(
    toy: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for command, changes, message in (
        (run_lora, {"reference_cache": str(tmp_path / "file")}, "cannot be used: Not a directory"),
        (run_lora, {"reference_cache": ""}, "reference_cache: string should have at least 1"),
        (run_cache, {}, "reference_cache: name a folder here"),
        (run_cache, {"reference_cache": "c", "defenses": {}}, "defense that reads the reference"),
    ):
        assert command(["--config", write(toy, tmp_path / "run", **changes)]) == 1
        lines = [x for x in capfd.readouterr().err.splitlines() if x.startswith("error: ")]
        assert len(lines) == 1
        assert message in lines[0]
        assert str(tmp_path / "run/config.yaml") in lines[0]
    assert not (tmp_path / "run/out").exists()


class LongestRow(Defense):
    needs_reference = True

    def positions(self, batch: Batch) -> torch.Tensor:
        lengths_B = (batch.conversation_BS >= 0).sum(dim=1)
        return batch.labelled_BS & (lengths_B == lengths_B.max())[:, None]

    def logit_term(self, policy: torch.Tensor, reference: torch.Tensor | None) -> torch.Tensor:
        return policy[:, 0]


def test_positions_that_depend_on_other_rows_are_refused(tmp_path: Path) -> None:
    samples = [{"tokens": [1, 2, 3], "labels": [1, 2, 3]}, {"tokens": [1, 2], "labels": [1, 2]}]
    batch = make_batch(samples, [0, 1], padded_collate_sft, pad_id=0)
    layout = Layout(np.array([2, 1]), width=4, dtype=torch.float32)
    cache = ReferenceCache(open_store(tmp_path, {}, layout, ""), [LongestRow()], torch.float32)
    with pytest.raises(UserError, match="other positions of row 1 than when the row stands alone"):
        cache.states(batch, batch.labelled_BS, lambda: pytest.fail("no forward is needed"))


@pytest.mark.parametrize("recipe", ["recipes/ema_lora.py", "recipes/ema_cache.py"])
def test_such_positions_on_one_process_alone_end_all(
    toy: dict[str, Any], tmp_path: Path, recipe: str
) -> None:
    """The first process, whose rows are as they should be, says it; nobody waits for the other."""
    defenses = {"leaves": {"_component_": "toy_mishaps.LeavesARowOut"}}
    cache = str(tmp_path / "cache")
    config = write(toy, tmp_path / "a", defenses=defenses, reference_cache=cache)
    done = run_ranks(Path(config), recipe=recipe)
    assert done.returncode == 1
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert "a defense acts on other positions of row " in line
    assert "Traceback" not in done.stderr
