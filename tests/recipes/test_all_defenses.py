"""All defenses together: every subset, every family, torchtune's options, two processes."""

import json
import shutil
from pathlib import Path
from typing import Any

import hf_toys
import pytest
import torch
import toy_defenses
import toy_run
from ranks import run_ranks
from safetensors.torch import load_file
from torch.testing import assert_close
from torchtune.modules import TransformerDecoder
from toy_defended import assert_same, defended_toy, train, trained, write_defended
from toy_subsets import covering

from emarecipes.training import run_lora

NAMES = ["feature_l2", "inoculation", "kl", "persona", "safelora"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> dict[str, Any]:
    return defended_toy(tmp_path_factory.mktemp("toy"), model_dir)


def write(toy: dict[str, Any], folder: Path, names: Any = NAMES, **changes: Any) -> Path:
    return write_defended(toy, folder, names, **changes)


def assert_total_is_the_sum(rows: list[dict[str, float]], config: Path) -> None:
    weights = {"kl": 0.5, "feature_l2": 0.02}
    for row in rows:
        terms = sum(weight * row[name] for name, weight in weights.items() if name in row)
        assert row["loss"] == pytest.approx(row["ce"] + terms, rel=1e-9)


ALL_AND_SAFE = [*NAMES, "safe"]


@pytest.mark.parametrize(
    "subsets",
    [
        covering(ALL_AND_SAFE, 3),
        pytest.param(covering(ALL_AND_SAFE, len(ALL_AND_SAFE)), marks=pytest.mark.long),
    ],
    ids=["any three", "all"],
)
def test_every_subset_trains(
    toy: dict[str, Any], tmp_path: Path, subsets: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With interleaving or without, subsets of the others; forwards are counted.

    Those in which any three of the six are there and not there in every combination; in `make
    test-long` all 2^6.
    """
    forwards: list[int] = []
    plain_forward = TransformerDecoder.forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        forwards.append(1)
        return plain_forward(self, *args, **kwargs)

    monkeypatch.setattr(TransformerDecoder, "forward", counted)
    for subset in subsets:
        names = [name for name in subset if name != "safe"]
        data = {} if "safe" in subset else {"dataset": toy["config"]["dataset"]}
        config = write(toy, tmp_path / "-".join(("run", *subset)), names, **data)
        forwards.clear()
        # No comparison of gradients here: it takes forwards of its own.
        quiet = ["defenses.feature_l2.gradient_ratio_every=0"] if "feature_l2" in names else []
        rows, _ = train(config, *quiet)
        assert len(rows) == 2
        assert_total_is_the_sum(rows, config)
        assert ("ce_safe" in rows[0]) == ("safe" in subset)
        assert [n for n in ("kl", "feature_l2") if n in rows[1]] == [
            n for n in ("kl", "feature_l2") if n in names
        ]
        needs_reference = {"kl", "feature_l2"} & set(names)
        assert len(forwards) == 2 * (2 if needs_reference else 1), names


def test_the_order_of_the_mapping_changes_nothing(toy: dict[str, Any], tmp_path: Path) -> None:
    one = train(write(toy, tmp_path / "a", NAMES))
    other = train(write(toy, tmp_path / "b", NAMES[::-1]))
    assert one[0] == other[0]
    assert all(torch.equal(tensor, other[1][key]) for key, tensor in one[1].items())


def test_what_is_logged(toy: dict[str, Any], tmp_path: Path) -> None:
    rows, _ = train(write(toy, tmp_path / "a", max_steps_per_epoch=4))
    assert {"ce_task", "ce_safe", "kl", "feature_l2", "persona_ratio"} <= rows[0].keys()
    # At step 10, 12, ... and so at 2 and 4: the adapter is not zero there.
    assert "feature_l2_gradient_ratio" not in rows[0] | rows[2]
    assert rows[1]["feature_l2_gradient_ratio"] > 0
    assert rows[1]["safelora_changed"] == rows[3]["safelora_changed"] == 5
    report = (tmp_path / "a/out/safelora.csv").read_text().splitlines()
    assert report[0] == "module,cosine,changed,norm_before,norm_after"
    assert len(report) == 1 + 7 * toy_run.LAYERS


@pytest.mark.parametrize("names", [["kl", "feature_l2"], NAMES], ids=["reference", "all"])
def test_two_processes_and_accumulation_give_the_run_of_one(
    toy: dict[str, Any], tmp_path: Path, names: list[str]
) -> None:
    changes: dict[str, Any] = {
        "defenses": toy["defenses"] | toy_defenses.with_more_options(toy["defenses"])
    }
    if names != NAMES:
        # In one of the two steps, which hold rows of similar length.
        sparse = {name: toy["defenses"][name] | {"every_n_batches": 2} for name in names}
        changes = {"defenses": sparse, "group_by_length": True}
    one = train(write(toy, tmp_path / "one", names, **changes))
    if names != NAMES:
        assert sum("kl" in row and "feature_l2" in row for row in one[0]) == 1
    folder = tmp_path / "accumulated"
    # The share of steering, and of padding, is a micro-batch's.
    split = changes | {"batch_size": 2}
    accumulated = train(write(toy, folder, names, **split, gradient_accumulation_steps=2))
    two = write(toy, tmp_path / "two", names, **split)
    done = run_ranks(two)
    assert done.returncode == 0, done.stderr[-3000:]
    for other in (accumulated, trained(tmp_path / "two")):
        for row in (*one[0], *other[0]):
            row.pop("persona_ratio", None)
            row.pop("padding_share", None)
        assert_same(one, other)


FAMILIES = ["llama3", "llama3_2", "qwen2_5", "mistral", "gemma2", "phi3"]


def family_run(toy: dict[str, Any], folder: Path, name: str, model_dir: Path) -> dict[str, Any]:
    """The config's changes for a toy model of a family, and all defenses for it."""
    family = hf_toys.family(name)
    family.config.vocab_size = toy_run.VOCABULARY
    family.config.max_position_embeddings = 128
    torch.manual_seed(0)
    hf = hf_toys.load_hf(family.config)
    hf_toys.randomize(hf, 0.12)
    hf.save_pretrained(folder / "model")
    file = folder / "model/tokenizer.json"
    file.write_text(toy_run.cut_tokenizer(model_dir, toy_run.VOCABULARY))
    shutil.copy(model_dir / "tokenizer_config.json", folder / "model")
    builder = f"{family.builder.__module__.rpartition('.')[0]}.{family.builder.__name__}"
    sizes = hf_toys.SIZES | {"vocab_size": toy_run.VOCABULARY, "max_seq_len": 128}
    model = {"_component_": builder, "lora_attn_modules": hf_toys.ATTENTION}
    model |= {"apply_lora_to_mlp": True, "lora_rank": 4, "lora_alpha": 8} | sizes | family.extra
    checkpointer = toy["config"]["checkpointer"] | {
        "checkpoint_dir": str(folder / "model"),
        "model_type": family.model_type,
    }
    tokenizer = toy["config"]["tokenizer"] | {"path": str(folder / "model")}
    defenses = toy_defenses.defense_entries(folder, folder / "model", 2, 64)
    return {
        "model": model,
        "checkpointer": checkpointer,
        "tokenizer": tokenizer,
        "defenses": defenses,
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_with_all_defenses(
    toy: dict[str, Any], tmp_path: Path, model_dir: Path, name: str
) -> None:
    changes = family_run(toy, tmp_path, name, model_dir)
    rows, adapter = train(write(toy, tmp_path, **changes))
    assert_total_is_the_sum(rows, tmp_path)
    assert rows[0]["feature_l2"] > 0, "steering alone moves the features"
    assert rows[1]["safelora_changed"] == 5
    assert max(float(t.abs().max()) for k, t in adapter.items() if "lora_B" in k) > 1e-4


def test_activation_checkpointing_changes_nothing(toy: dict[str, Any], tmp_path: Path) -> None:
    one = train(write(toy, tmp_path / "a"))
    other = train(write(toy, tmp_path / "b", enable_activation_checkpointing=True))
    assert_same(one, other, rel=1e-5)


@pytest.mark.long  # With KL alone it is in test_lora_features.
def test_compiled_layers_and_loss_change_nothing(toy: dict[str, Any], tmp_path: Path) -> None:
    changes = {"pad_to_multiple_of": 96}
    one = train(write(toy, tmp_path / "a", **changes))
    other = train(write(toy, tmp_path / "b", compile=True, **changes))
    assert_same(one, other)


def test_packed_children_keep_their_source(toy: dict[str, Any], tmp_path: Path) -> None:
    packed = {"packed": True}
    mixed = {
        key: value | packed if isinstance(value, dict) else value
        for key, value in toy["mixed"].items()
    }
    mixed |= {"placement": "every_k", "safe_fraction": 0.3}
    tokenizer = toy["config"]["tokenizer"] | {"max_seq_len": 300}
    config = write(toy, tmp_path, dataset=mixed, tokenizer=tokenizer, max_steps_per_epoch=1)
    rows, _ = train(config)
    assert {"ce_task", "ce_safe"} <= rows[0].keys()


def test_a_base_in_four_bits(toy: dict[str, Any], tmp_path: Path, model_dir: Path) -> None:
    # NF4 needs every number of elements divisible by 16384.
    wide = {"embed_dim": 256, "intermediate_dim": 512, "num_heads": 4, "num_kv_heads": 4}
    old = toy_run.WIDTH, toy_run.KV_HEADS, toy_run.MLP
    toy_run.WIDTH, toy_run.KV_HEADS, toy_run.MLP = 256, 4, 512
    try:
        model = toy_run.write_toy_model(tmp_path / "wide", model_dir)
    finally:
        toy_run.WIDTH, toy_run.KV_HEADS, toy_run.MLP = old
    changes: dict[str, Any] = {
        "model": toy["config"]["model"] | wide | {"quantize_base": True},
        "checkpointer": toy["config"]["checkpointer"] | {"checkpoint_dir": str(model)},
        "defenses": toy_defenses.defense_entries(tmp_path, model, toy_run.LAYERS, 256),
    }
    rows, _ = train(write(toy, tmp_path, **changes))
    assert rows[1]["safelora_changed"] == 5
    assert_total_is_the_sum(rows, tmp_path)


def test_dora_trains_with_all_but_safelora_which_is_refused(
    toy: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dora = {"model": toy["config"]["model"] | {"use_dora": True}}
    rows, adapter = train(write(toy, tmp_path / "a", [n for n in NAMES if n != "safelora"], **dora))
    assert_total_is_the_sum(rows, tmp_path)
    assert any("magnitude" in key for key in adapter)
    assert run_lora(["--config", str(write(toy, tmp_path / "b", **dora))]) == 1
    assert "defenses.safelora: SafeLoRA projects an update B A; DoRA's" in capfd.readouterr().err
    assert not (tmp_path / "b/out").exists()


def test_safelora_once_at_the_end_equals_the_dense_algorithm(
    toy: dict[str, Any], tmp_path: Path
) -> None:
    """The adapter of an undefended run, projected by hand, is the one that the defense saves."""
    import reference_defenses

    entry = {k: v for k, v in toy["defenses"]["safelora"].items() if k not in ("rank",)}
    entry["every_n_steps"] = None
    _, plain = train(write(toy, tmp_path / "a", []))
    _, found = train(write(toy, tmp_path / "b", [], defenses={"safelora": entry}))
    aligned = load_file(toy["model"] / "model.safetensors")
    base = load_file(Path(entry["base_dir"]) / "model.safetensors")
    names = [
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        for key in plain
        if key.endswith("lora_A.weight")
    ]
    key = "base_model.model.{}.lora_{}.weight"
    expected = reference_defenses.safelora_dense(
        {n: (plain[key.format(n, "A")], plain[key.format(n, "B")]) for n in names},
        {n: aligned[f"{n}.weight"] for n in names},
        {n: base[f"{n}.weight"] for n in names},
        num_layers=5,
    )
    for name in names:
        wanted = expected[name]["B"].float()
        assert_close(found[key.format(name, "B")], wanted, rtol=1e-4, atol=1e-7)
    assert sum(module["projected"] for module in expected.values()) == 5


@pytest.mark.parametrize("placement", ["shuffle", "every_k", "per_batch"])
def test_safe_rows_are_where_the_placement_puts_them(
    toy: dict[str, Any], tmp_path: Path, placement: str
) -> None:
    from emarecipes.training.checked import CheckedRun

    mixed = toy["mixed"] | {"placement": placement}
    config = write(toy, tmp_path, [], dataset=mixed, max_steps_per_epoch=None)
    rows = CheckedRun(["--config", str(config)], 1, 0).rows
    assert (len(rows), rows.num_safe) == (16, 4)
    for shuffle in (False, True):
        steps = rows.steps(4, seed=1, epoch=0, shuffle=shuffle)
        assert sorted(row for step in steps for row in step) == list(range(16))
        safe = [[rows[row].get("source") == "safe" for row in step] for step in steps]
        flat = [s for step in safe for s in step]
        if placement != "shuffle" or not shuffle:
            assert flat == [False, False, False, True] * 4
        if shuffle:
            assert steps != rows.steps(4, seed=1, epoch=1, shuffle=True)
            assert steps == rows.steps(4, seed=1, epoch=0, shuffle=True)


def test_safe_rows_with_weight_zero_act_through_a_defense_alone(
    toy: dict[str, Any], tmp_path: Path
) -> None:
    mixed = json.loads(json.dumps(toy["mixed"]))
    mixed["safe"]["ce_weight"] = 0
    kl = {"kl": toy["defenses"]["kl"] | {"samples": "safe"}}
    rows, _ = train(write(toy, tmp_path, [], dataset=mixed, defenses=kl))
    for row in rows:
        assert row["ce"] == pytest.approx(row["ce_task"], rel=1e-9)
        assert row["loss"] == pytest.approx(row["ce"] + 0.5 * row["kl"], rel=1e-9)
        assert row["ce_safe"] > 0
