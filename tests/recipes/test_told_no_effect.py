"""A defense without a gradient of its own that does next to nothing is told, in a run."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_defenses
import toy_run
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from toy_defended import defended_toy, train, write_defended

TOLD = ("next to nothing", "it changes nothing", "nothing shows")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("toy")
    toy = defended_toy(folder, model_dir)
    toy["config"]["lr_scheduler"]["num_warmup_steps"] = 0
    later = toy_defenses.later_entries(folder, toy["model"], toy_run.LAYERS, toy_run.WIDTH)
    faded = {"schedule": "linear", "decay_steps": 1}
    toy["defenses"] |= later | {
        "weights": {"_component_": "toy_mishaps.SameWeights"},
        "faded": toy["defenses"]["persona"] | faded,
        "later": {"_component_": "toy_mishaps.SmallAtFirst"},
        "unlogged": {"_component_": "toy_mishaps.SmallAtFirst", "key": "sise"},
        "of_safe": {"_component_": "toy_mishaps.HalfOfSafe"},
        "unseen": {"_component_": "toy_mishaps.TwoSignalsWithin"},
    }
    return toy


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("persona", {"alpha": 1e-9}, "persona_ratio is "),
        ("persona", {}, None),
        ("faded", {}, None),  # alpha is 0 in the last step, and was not in the first.
        ("trait", {"strength": 1e-9}, "trait_ratio is "),
        ("trait", {}, None),
        ("ablation", {}, None),
        ("weights", {}, "defenses.weights takes the place of cross entropy and is equal to it"),
        ("weights", {"weight": 0.0}, None),
        ("constraint", {}, None),
        ("later", {}, None),  # In the last step alone.
        ("unlogged", {}, "unlogged_sise, the effect_figure of defenses.unlogged, was not logged"),
        ("unseen", {}, "defenses.unseen changes the policy's forward and names no effect_figure"),
        ("average", {"decay": 1e-9}, "average_distance is "),
        ("average", {}, None),
        ("of_safe", {}, None),  # In the second of three steps alone: the others have no safe row.
    ],
)
def test_what_is_told(
    name: str,
    change: dict[str, Any],
    told: str | None,
    toy: dict[str, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    changes = {"defenses": {name: toy["defenses"][name] | change}}
    if name == "of_safe":
        changes["dataset"] = toy["mixed"] | {"placement": "every_k", "safe_fraction": 0.125}
        changes |= {"shuffle": False, "max_steps_per_epoch": 3}
    config = write_defended(toy, tmp_path / "a", [], **changes)
    rows, _ = train(config)
    if name == "of_safe":
        assert ["ce_safe" in row for row in rows] == [False, True, False]
    found = [r.getMessage() for r in caplog.records if any(t in r.getMessage() for t in TOLD)]
    assert len(found) == (told is not None)
    if told is not None:
        assert found[0].startswith("step 2: ") and told in found[0]


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_prefix_that_no_row_begins_with_is_told_once(
    system: str | None, toy: dict[str, Any], tmp_path: Path
) -> None:
    """At the start, by the first of two processes."""
    entry = toy["defenses"]["prefix"] | {"system": system}
    config = write_defended(
        toy, tmp_path / "a", [], defenses={"prefix": entry}, max_steps_per_epoch=1, batch_size=2
    )
    done = run_ranks(config)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [x for x in (done.stdout + done.stderr).splitlines() if "of the rows begin with" in x]
    assert len(told) == (system is not None)


@pytest.mark.parametrize(
    ("name", "change", "steps", "told"),
    [
        ("prefix", {"threshold": 100.0}, 3, True),
        ("prefix", {}, 3, False),
        ("prefix", {"threshold": 100.0}, 2, False),  # With a warm-up a term may be 0 till then.
        ("kl", {}, 3, False),
    ],
)
def test_a_term_without_gradient_is_told_at_the_end_of_a_short_run(
    name: str,
    change: dict[str, Any],
    steps: int,
    told: bool,
    toy: dict[str, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    changes = {"defenses": {name: toy["defenses"][name] | change}, "max_steps_per_epoch": steps}
    rows, _ = train(write_defended(toy, tmp_path / "a", [], **changes))
    line = f"step {steps}: the gradient of defenses.{name} is 0"
    assert any(r.getMessage().startswith(line) for r in caplog.records) == told
    compared = [row["step"] for row in rows if f"{name}_gradient_ratio" in row]
    assert compared == ([] if steps == 2 else [3])
    assert steps == 2 or (rows[-1][f"{name}_gradient_ratio"] == 0) == told


def test_the_update_of_any_run_is_described_after_each_epoch(
    toy: dict[str, Any], tmp_path: Path
) -> None:
    """As the singular values of each whole B A in float64 have it; log_every_n_steps or not."""
    changes = {"epochs": 2, "log_every_n_steps": 3}
    rows, adapter = train(write_defended(toy, tmp_path / "a", ["kl"], **changes))
    described = [row for row in rows if "update_stable_rank" in row]
    assert [row["step"] for row in described] == [2, 4]
    ranks, entropies = [], []
    for key, a_RI in adapter.items():
        if "lora_A" in key:
            update = adapter[key.replace("lora_A", "lora_B")].double() @ a_RI.double()
            s = torch.linalg.svdvals(update)[:4]
            ranks.append(float((s / s[0]).square().sum()))
            entropies.append(float(torch.special.entr(s / s.sum()).sum()))
    assert len(ranks) == 7 * toy_run.LAYERS
    assert rows[-1]["update_stable_rank"] == pytest.approx(sum(ranks) / len(ranks), rel=1e-4)
    assert rows[-1]["update_entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-4)


def test_of_a_dora_adapter_it_is_that_of_b_a(toy: dict[str, Any], tmp_path: Path) -> None:
    model = {"model": toy["config"]["model"] | {"use_dora": True}}
    rows, _ = train(write_defended(toy, tmp_path / "a", ["spectral"], **model))
    assert rows[1]["spectral"] > 0 and rows[1]["update_stable_rank"] > 1


def test_an_adapter_that_changes_other_blocks_than_the_middle_one(
    toy: dict[str, Any], tmp_path: Path
) -> None:
    """The size of what it adds is logged all the same, in the block that it changes most."""

    path = Path(toy["defenses"]["trait"]["adapter"])
    tensors = load_file(path / "adapter_model.safetensors")
    ratios = []
    for name, factor in (("faint", 1e-6), ("none", 0.0)):
        folder = tmp_path / name / "adapter"
        shutil.copytree(path, folder)
        faint = {
            k: factor * t if "layers.1." in k and "lora_B" in k else t for k, t in tensors.items()
        }
        save_file(faint, folder / "adapter_model.safetensors")
        entry = toy["defenses"]["trait"] | {"adapter": str(folder)}
        rows, _ = train(write_defended(toy, tmp_path / name, [], defenses={"trait": entry}))
        ratios.append(rows[0]["trait_ratio"])
    assert ratios[0] > 0.01 and ratios[0] == pytest.approx(ratios[1], rel=1e-3)
