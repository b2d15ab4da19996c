"""The defenses that came after the paper, in runs: in pairs, on two processes, resumed."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_defenses
import toy_run
from ranks import run_ranks
from safetensors.torch import load_file
from toy_defended import assert_same, template_toy, train, trained, without_parts, write_defended
from toy_subsets import covering

EARLIER = ["feature_l2", "inoculation", "kl", "persona", "safelora"]
LATER = ["ablation", "anchored", "asft", "average", "block", "constraint", "prefix"]
LATER += ["spectral", "surgery", "trait"]
REPLACING = ["anchored", "constraint"]  # Cross entropy: a run has one of them.
TOGETHER = [name for name in LATER if name != "anchored"]
OF_A_PART = ["padding_share", "ablation_removed", "block_rise", "trait_ratio"]
SPARSE = ["asft", "block", "prefix", "spectral"]  # With `every_n_batches`.
# The name under which each logs something, in a run of two steps.
LOGGED = {
    "ablation": "ablation_removed",
    "anchored": "anchored",
    "asft": "asft",
    "average": "average_distance",
    "block": "block",
    "constraint": "constraint",
    "prefix": "prefix",
    "spectral": "spectral",
    "surgery": "surgery_projected",
    "trait": "trait_ratio",
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("toy")
    toy = template_toy(folder)
    later = toy_defenses.later_entries(folder, toy["model"], toy_run.LAYERS, toy_run.WIDTH)
    assert sorted(later) == LATER
    toy["defenses"] |= later
    return toy


def adapter_of(toy: dict[str, Any], folder: Path, names: list[str]) -> dict[str, torch.Tensor]:
    """Train with these: each logs what it should, and the loss is the sum of the terms."""
    rows, adapter = train(write_defended(toy, folder / "-".join(["run", *names]), names))
    assert len(rows) == 2
    for each in names:
        assert LOGGED.get(each, "loss") in rows[1], names
    terms = sum(
        toy["defenses"][each].get("weight", 1.0) * rows[1][each]
        for each in names
        if each in rows[1]
    )
    ce = 0.0 if set(names) & set(REPLACING) else rows[1]["ce"]
    assert rows[1]["loss"] == pytest.approx(ce + terms, rel=1e-9), names
    return adapter


def differ(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def plain(toy: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return adapter_of(toy, tmp_path_factory.mktemp("plain"), [])


@pytest.mark.parametrize("name", LATER)
def test_each_trains_and_changes_what_is_learned(
    toy: dict[str, Any], plain: dict[str, torch.Tensor], tmp_path: Path, name: str
) -> None:
    """But for the average, which is written beside the adapter."""
    assert differ(plain, adapter_of(toy, tmp_path, [name])) == (name != "average")


def test_all_pairs_train(toy: dict[str, Any], tmp_path: Path) -> None:
    """Any two together, each without the other, and neither: in a few runs of several.

    Every pair in a run of its own is in `make test-long`.
    """
    for names in covering(EARLIER + LATER, 2, lambda names: not names.issuperset(REPLACING)):
        adapter_of(toy, tmp_path, names)


@pytest.mark.long
@pytest.mark.parametrize("name", LATER)
def test_every_pair_trains(toy: dict[str, Any], tmp_path: Path, name: str) -> None:
    """With each earlier one, and with each that comes after it in the list."""
    others = EARLIER + LATER[LATER.index(name) + 1 :]
    others = [other for other in others if not {name, other}.issuperset(REPLACING)]
    adapters = [adapter_of(toy, tmp_path, [name, *other]) for other in ([], *([o] for o in others))]
    assert all(differ(one, another) for one, another in itertools.pairwise(adapters))


def test_two_processes_and_accumulation_give_the_run_of_one(
    toy: dict[str, Any], tmp_path: Path
) -> None:
    longer = {"max_steps_per_epoch": 3}
    one = train(write_defended(toy, tmp_path / "one", TOGETHER, **longer))
    split = longer | {"batch_size": 2}
    accumulated = write_defended(
        toy, tmp_path / "accumulated", TOGETHER, **split, gradient_accumulation_steps=2
    )
    two = write_defended(toy, tmp_path / "two", TOGETHER, **split)
    done = run_ranks(two)
    assert done.returncode == 0, done.stderr[-3000:]
    for other in (train(accumulated), trained(tmp_path / "two")):
        without_parts([*one[0], *other[0]], *OF_A_PART)
        assert_same(one, other)
    averages = [average_of(tmp_path / name) for name in ("one", "accumulated", "two")]
    for each in averages[1:]:
        assert_same(([], averages[0]), ([], each))


def average_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "out/adapter_average/adapter_model.safetensors")


def test_projected_steps_of_two_processes_are_those_of_one(
    toy: dict[str, Any], tmp_path: Path
) -> None:
    """One of the processes has the safe row of a step; dot product and norms are of both."""
    longer = {"max_steps_per_epoch": 4}
    one = train(write_defended(toy, tmp_path / "one", ["surgery"], **longer))
    two = write_defended(toy, tmp_path / "two", ["surgery"], **longer, batch_size=2)
    done = run_ranks(two)
    assert done.returncode == 0, done.stderr[-3000:]
    other = trained(tmp_path / "two")
    assert [row["surgery_projected"] for row in one[0]][1:] == [1.0, 1.0, 1.0]
    without_parts([*one[0], *other[0]], "padding_share")
    assert_same(one, other)


def test_a_resumed_run_is_the_uninterrupted_one(toy: dict[str, Any], tmp_path: Path) -> None:
    """Over step 10, where each term's gradient is compared once, and no more after it."""
    longer = {"max_steps_per_epoch": 4, "epochs": 3, "save_every_n_steps": 11}
    whole = train(write_defended(toy, tmp_path / "whole", TOGETHER, **longer))
    compared = [row["step"] for row in whole[0] if "spectral_gradient_ratio" in row]
    assert compared == [10] and whole[0][9]["spectral_gradient_ratio"] > 0
    checkpoint = tmp_path / "whole/out/checkpoints/step_11"
    again = write_defended(toy, tmp_path / "again", TOGETHER, **longer)
    found = train(again, f"resume={checkpoint}")
    assert found[0][-1] == whole[0][-1]
    assert all(torch.equal(tensor, found[1][key]) for key, tensor in whole[1].items())
    averages = [average_of(tmp_path / name) for name in ("whole", "again")]
    assert all(torch.equal(tensor, averages[1][key]) for key, tensor in averages[0].items())


@pytest.mark.parametrize("names", [["anchored"], TOGETHER], ids=["anchored", "the others"])
def test_packed_and_from_the_reference_cache(
    toy: dict[str, Any], tmp_path: Path, names: list[str]
) -> None:
    """The second epoch reads what the first one stored."""
    packed = {"packed": True}
    mixed = {k: v | packed if isinstance(v, dict) else v for k, v in toy["mixed"].items()}
    mixed |= {"placement": "every_k", "safe_fraction": 0.4}
    alone = toy["config"]["dataset"] | packed
    changes: dict[str, Any] = {"dataset": mixed if "surgery" in names else alone, "batch_size": 1}
    changes |= {"epochs": 2}
    computed = train(write_defended(toy, tmp_path / "computed", names, **changes))
    cached = {"reference_cache": str(tmp_path / "cache")}
    read = train(write_defended(toy, tmp_path / "read", names, **changes | cached))
    assert len(read[0]) == 4
    assert_same(computed, read)


def test_terms_of_some_steps_alone(toy: dict[str, Any], tmp_path: Path) -> None:
    """Drawn by step and seed: however a step is split, and also where a run is resumed."""
    sparse = {n: toy["defenses"][n] | {"every_n_batches": 2} for n in SPARSE}
    rest = {n: toy["defenses"][n] for n in TOGETHER if n not in (*SPARSE, "surgery")}
    changes: dict[str, Any] = {"defenses": rest | sparse, "epochs": 2, "save_every_n_steps": 2}
    changes["max_steps_per_epoch"] = 3
    whole = train(write_defended(toy, tmp_path / "whole", [], **changes))
    for name in SPARSE:
        assert 1 < sum(name in row for row in whole[0]) < 6, name
    again = write_defended(toy, tmp_path / "again", [], **changes)
    assert_same(whole, train(again, f"resume={tmp_path / 'whole/out/checkpoints/step_4'}"))
    changes |= {"batch_size": 2, "gradient_accumulation_steps": 2}
    split = train(write_defended(toy, tmp_path / "split", [], **changes))
    without_parts([*whole[0], *split[0]], *OF_A_PART)
    assert_same(whole, split)


@pytest.mark.long
def test_compiled_layers_and_loss_change_nothing(toy: dict[str, Any], tmp_path: Path) -> None:
    changes: dict[str, Any] = {"pad_to_multiple_of": 96}
    one = train(write_defended(toy, tmp_path / "a", TOGETHER, **changes))
    other = train(write_defended(toy, tmp_path / "b", TOGETHER, compile=True, **changes))
    assert_same(one, other)


@pytest.mark.parametrize("others", [[], ["kl"], ["block"]])
def test_one_number_a_token_where_no_defense_reads_more(
    toy: dict[str, Any], tmp_path: Path, others: list[str]
) -> None:
    """The run without a cache, bit for bit, filled and full; others' states take their width."""
    names = ["constraint", *others]
    plain: dict[str, Any] = {"shuffle": False, "epochs": 2}
    computed = train(write_defended(toy, tmp_path / "computed", names, **plain))
    cached = plain | {"reference_cache": str(tmp_path / "cache")}
    for name in ("filled", "full"):
        found = train(write_defended(toy, tmp_path / name, names, **cached))
        assert found[0] == computed[0]
        assert all(torch.equal(tensor, found[1][key]) for key, tensor in computed[1].items())
    (folder,) = (tmp_path / "cache").iterdir()
    assert ("holds" in json.loads((folder / "key.json").read_text())) == (not others)
    numbers = (folder / "states.bin").stat().st_size // 4
    assert (numbers % toy_run.WIDTH == 0) == bool(others)


@pytest.mark.parametrize(
    ("names", "dropout"), [(["prefix", "trait"], 0.3), (TOGETHER, 0.0), (["users"], 0.0)], ids=str
)
def test_checkpointed_layers_run_again_as_they_ran(
    names: list[str], dropout: float, toy: dict[str, Any], tmp_path: Path
) -> None:
    """In the backward, where the prefix is read without dropout, and a user's hooks still act."""
    entry = {"_component_": "toy_mishaps.ShiftsKeysOfPrompts"}
    users = {"defenses": {"users": entry}} if names == ["users"] else {}
    more = {"model": toy["config"]["model"] | {"lora_dropout": dropout}} | users
    found = [
        train(
            write_defended(
                toy, tmp_path / str(again), [] if users else names, **more,
                enable_activation_checkpointing=again,
            )
        )
        for again in (False, True)
    ]  # fmt: skip
    (rows, adapter), (rows_again, adapter_again) = found
    for row, again in zip(rows, rows_again, strict=True):
        assert row["loss"] == pytest.approx(again["loss"], rel=1e-5)
    for key in adapter:
        torch.testing.assert_close(adapter[key], adapter_again[key], atol=2e-5, rtol=1e-4)
