"""What a reference cache belongs to, and what must not have one."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_run
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from torchtune.data import padded_collate_sft
from toy_cache import COMPONENT, cached_config, write

from emarecipes.defenses import Defense
from emarecipes.errors import UserError
from emarecipes.models.batch import Batch, make_batch
from emarecipes.training import run_cache, run_lora
from emarecipes.training.checked import CheckedRun
from emarecipes.training.reference_cache import ReferenceCache
from emarecipes.training.reference_cache_open import open_cache
from emarecipes.training.row_store import StoreLayout, open_store


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> dict[str, Any]:
    return cached_config(tmp_path_factory.mktemp("toy"), model_dir)


def folders(toy: dict[str, Any], tmp_path: Path, **changes: Any) -> set[str]:
    """The caches that exist after opening one for a config."""
    config = write(toy, tmp_path / "key", reference_cache=str(tmp_path / "cache"), **changes)
    cache = open_cache(CheckedRun(["--config", config], 1, 0), quiet=True)
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
    # One frequent token is never made; the numbers of all are the model's.
    swapped = shutil.copytree(model_dir, tmp_path / "swapped")
    tokenizer = json.loads((swapped / "tokenizer.json").read_text())
    merges = tokenizer["model"]["merges"]
    tokenizer["model"]["merges"] = [merge for merge in merges if "".join(merge) != "Ġthe"]
    assert len(tokenizer["model"]["merges"]) < len(merges)
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
        "numbers": {"defenses": {"constraint": {"_component_": COMPONENT + "TokenConstraint"}}},
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
    layout = StoreLayout(np.array([2, 1]), width=4, dtype=torch.float32)
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
