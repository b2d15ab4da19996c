"""torchtune's options beside a defense: that they run, and what must not change does not."""

import json
import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import toy_defenses
import toy_run
import yaml
from ranks import run_ranks
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch.testing import assert_close
from toy_features import UNTIED, losses, train, write

from emarecipes.training import built, run_lora


def approx_rows(expected: list[tuple[float, float, float]], rel: float) -> list[Any]:
    return [pytest.approx(row, rel=rel, abs=1e-6) for row in expected]


def test_activation_checkpointing_changes_nothing(models: dict[bool, Path], tmp_path: Path) -> None:
    plain = train(write(models, tmp_path / "a"))
    saved = train(write(models, tmp_path / "b", enable_activation_checkpointing=True))
    assert saved == approx_rows(plain, 1e-6)
    one, other = (
        load_file(tmp_path / name / "out/adapter/adapter_model.safetensors") for name in "ab"
    )
    assert_close(one, other)


def test_padding_to_a_multiple_changes_nothing(models: dict[bool, Path], tmp_path: Path) -> None:
    plain = train(write(models, tmp_path / "a"))
    padded = train(write(models, tmp_path / "b", pad_to_multiple_of=64))
    assert padded == approx_rows(plain, 1e-5)


PACKED: dict[str, dict[str, Any]] = {
    "kl": {},
    "kl, all tokens": {"tokens": "all"},
    "feature_l2": {},
    "feature_l2, last": {"tokens": "last"},
    "feature_l2, mean": {"tokens": "mean", "skip_first_token": True},
    "feature_l2, sequence": {"tokens": "all", "normalize": "sequence"},
    "persona": {},
    "persona, ablate": {"mode": "ablate"},
    "persona, answers": {"positions": "response"},
    "ablation": {},
    "anchored": {},
    "asft": {},
    "block": {},
    "constraint": {},
    "prefix": {},
    "safelora": {"every_n_steps": 1},
    "spectral": {},
    "inoculation": {},
    "trait": {},
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_rows_give_the_loss_of_the_same_rows(
    models: dict[bool, Path], tmp_path: Path, name: str
) -> None:
    entries = toy_defenses.defense_entries(tmp_path, models[True], toy_run.LAYERS, toy_run.WIDTH)
    entries |= toy_defenses.later_entries(tmp_path, models[True], toy_run.LAYERS, toy_run.WIDTH)
    defense = name.split(",")[0]
    defenses = {defense: entries[defense] | PACKED[name]}
    shared: dict[str, Any] = {"defenses": defenses, "tokenizer": {"max_seq_len": 400}}
    # One step over all 24 rows, and one over all packs of them.
    plain = write(models, tmp_path / "a", batch_size=24, epochs=3, **shared)
    packed_config = write(models, tmp_path / "b", dataset={"packed": True}, epochs=3, **shared)
    from emarecipes.training.checked import CheckedRun

    packs = len(CheckedRun(["--config", str(packed_config)], 1, 0).rows)
    assert 4 < packs < 12
    assert run_lora(["--config", str(packed_config), f"batch_size={packs}"]) == 0
    assert run_lora(["--config", str(plain)]) == 0
    expected, found = (toy_run.metrics(tmp_path / folder / "out") for folder in "ab")
    assert len(found) == 3
    for one, other in zip(expected, found, strict=True):
        told = {"loss", "ce", *(key for key in one if key.startswith(defense))}
        for key in told & one.keys():
            assert other[key] == pytest.approx(one[key], rel=3e-5, abs=1e-6), key
    if defense in ("persona", "ablation", "trait"):
        assert {"persona_ratio", "ablation_removed", "trait_ratio"} & found[2].keys()
    elif defense not in ("inoculation", "safelora"):
        assert found[2][defense] > 0


def test_surgery_on_packs_of_several_conversations_has_the_kl_of_its_control(
    models: dict[bool, Path], tmp_path: Path
) -> None:
    """The rows of a term apart are a batch of their own; two safe conversations lie in a pack."""
    safe = toy_defenses.write_safe_rows(tmp_path / "safe.jsonl", 24)
    kl = {"weight": 1.0, "samples": "safe", "tokens": "all"}
    found = []
    for name in ("KLToReference", "GradientSurgery"):
        folder = tmp_path / name
        config = write(models, folder, tokenizer={"max_seq_len": 512}, batch_size=2)
        cfg = yaml.safe_load(config.read_text())
        cfg["dataset"] = toy_defenses.interleaved(
            cfg["dataset"] | {"packed": True}, safe, placement="per_batch"
        )
        cfg["dataset"]["safe_fraction"] = 0.5
        cfg["lr_scheduler"]["num_warmup_steps"] = 0
        cfg["defenses"] = {"kl": {"_component_": f"emarecipes.defenses.{name}"} | kl}
        toy_run.write_config(config, cfg)
        assert run_lora(["--config", str(config)]) == 0
        found.append([row["kl"] for row in toy_run.metrics(folder / "out")])
    # After one step from the same adapter; later ones go their own ways.
    assert found[0][:2] == pytest.approx(found[1][:2], rel=1e-5) and found[0][1] > 0


def test_dora_and_lora_on_the_output_layer(models: dict[bool, Path], tmp_path: Path) -> None:
    for dora in (False, True):
        folder = tmp_path / str(dora)
        model = UNTIED | {"apply_lora_to_output": True, "use_dora": dora}
        found = train(write(models, folder, model=model))
        assert abs(found[0][2]) < 1e-6
        assert found[-1][2] > 1e-4
        adapter = load_file(folder / "out/adapter/adapter_model.safetensors")
        assert adapter["base_model.model.lm_head.lora_B.weight"].abs().max() > 1e-3


def test_a_base_in_four_bits(models: dict[bool, Path], tmp_path: Path, model_dir: Path) -> None:
    # NF4 needs every shard's number of elements divisible by 16384.
    wide = {"embed_dim": 256, "intermediate_dim": 512, "num_heads": 4, "num_kv_heads": 4}
    old = toy_run.WIDTH, toy_run.KV_HEADS, toy_run.MLP
    toy_run.WIDTH, toy_run.KV_HEADS, toy_run.MLP = 256, 4, 512
    try:
        wide_model = toy_run.write_toy_model(tmp_path / "wide", model_dir)
    finally:
        toy_run.WIDTH, toy_run.KV_HEADS, toy_run.MLP = old
    config = write({True: wide_model}, tmp_path / "a", model=wide | {"quantize_base": True})
    found = train(config)
    assert found[0][2] == 0.0
    assert found[-1][2] > 1e-5
    found_two = run_ranks(config, "output_dir=" + str(tmp_path / "two/out"), "batch_size=2")
    assert found_two.returncode == 0, found_two.stderr[-2000:]
    assert losses(tmp_path / "two") == approx_rows(found, 1e-4)
    refused = run_ranks(config, f"output_dir={tmp_path}/three/out", "batch_size=1", processes=3)
    assert refused.returncode != 0
    assert "in 4 bits on 3 process(es) it needs a multiple of 49152" in refused.stderr
    assert len(toy_run.error_lines(refused)) == 1


@pytest.mark.early
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_compiled_layers(
    models: dict[bool, Path], tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rows in each step, so that each graph is compiled for one shape alone.

    The loss head's chunk becomes C++ in both; torchtune's layers, a minute of it, under `long`. A
    chunk of two shapes: test_a_compiled_chunk_equals_the_reference.
    """
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", backend)  # Which torchtune reads.
    torch._dynamo.reset()
    rows = str(toy_run.write_rows(tmp_path / "four.jsonl", 4))
    steps = {"dataset": {"data_files": rows}, "epochs": 3, "max_steps_per_epoch": 1}
    plain = train(write(models, tmp_path / "a", pad_to_multiple_of=128, **steps))
    assert len(plain) == 3 and plain[2][2] > 1e-4
    graphs, in_inductor = counters["stats"]["unique_graphs"], sum(counters["inductor"].values())
    with patch.object(built, "keep_compiled_apart", wraps=built.keep_compiled_apart) as apart:
        config = write(models, tmp_path / "b", pad_to_multiple_of=128, compile=True, **steps)
        compiled = train(config)
    apart.assert_called_once()
    assert compiled == approx_rows(plain, 1e-4)
    # Of a layer, with the adapter's gradient and without the adapter; and of the loss head's chunk,
    # which alone goes there where layers do not.
    assert counters["stats"]["unique_graphs"] - graphs >= 3
    assert sum(counters["inductor"].values()) > in_inductor


@pytest.mark.parametrize(
    "changes",
    [
        {"model": UNTIED | {"apply_lora_to_output": True}},
        {"model": UNTIED | {"use_dora": True}, "enable_activation_checkpointing": True},
        {"model": UNTIED, "custom_sharded_layers": ["tok_embeddings", "output"]},
        {"fsdp_reshard_after_forward": False, "clip_grad_norm": 0.1},
    ],
    ids=["lora on output", "dora, checkpointing", "custom sharding", "no reshard, clipping"],
)
def test_two_processes_give_the_losses_of_one(
    models: dict[bool, Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    # Where a gradient is nearly zero, Adam makes up to a learning rate of its rounding.
    changes = changes | {"optimizer": {"_component_": "torch.optim.AdamW", "lr": 2e-3}}
    alone = write(models, tmp_path / "one", shuffle=True, **changes)
    shared = changes | {"batch_size": 2, "save_merged": "use_dora" in changes.get("model", {})}
    together = write(models, tmp_path / "two", shuffle=True, **shared)
    done = run_ranks(together)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = train(alone)
    assert losses(tmp_path / "two") == approx_rows(expected, 1e-4)
    one, two = (
        load_file(tmp_path / name / "out/adapter/adapter_model.safetensors")
        for name in ("one", "two")
    )
    for key, tensor in one.items():
        assert_close(two[key], tensor, rtol=1e-4, atol=1e-4)
    if shared["save_merged"]:
        assert (tmp_path / "two/out/merged/model.safetensors").is_file()
        distance, effect = merged_distance(done.stderr)
        assert distance < 1e-4 < 1e-2 < effect


def merged_distance(log: str) -> tuple[float, float]:
    found = re.search(r"from the adapter's ([\d.e-]+), where .* whole effect is ([\d.e-]+)", log)
    assert found is not None, log[-2000:]
    return float(found[1]), float(found[2])


def test_stock_loggers_profiler_and_merged_weights(
    models: dict[bool, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = write(
        models,
        tmp_path / "a",
        metric_logger={
            "_component_": "torchtune.training.metric_logging.TensorBoardLogger",
            "log_dir": str(tmp_path / "a/out/logs"),
        },
        profiler={
            "_component_": "torchtune.training.setup_torch_profiler",
            "enabled": True,
            "output_dir": str(tmp_path / "a/out/profile"),
            "cpu": True,
            "cuda": False,
            "wait_steps": 0,
            "warmup_steps": 1,
            "active_steps": 1,
            "num_cycles": 1,
        },
        save_merged=True,
    )
    with caplog.at_level("INFO"):
        train(config)
    distance, effect = merged_distance(caplog.text)
    assert distance < 1e-3 < 0.1 < effect
    out = tmp_path / "a/out"
    assert list(out.glob("logs/**/events.out.tfevents.*"))
    assert list(out.glob("profile/**/*.json*"))
    base = AutoModelForCausalLM.from_pretrained(models[True], dtype=torch.float32)
    tokens = torch.tensor([[1, 400, 500, 600, 2]])
    with torch.no_grad():
        plain = base(tokens).logits
        adapted = PeftModel.from_pretrained(base, out / "adapter")(tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)
        assert_close(merged(tokens).logits, adapted, rtol=1e-3, atol=1e-3)
    assert (adapted - plain).abs().max() > 0.05
    adapter_config = json.loads((out / "adapter/adapter_config.json").read_text())
    assert adapter_config["base_model_name_or_path"] == str(models[True])


def test_adapter_scaling_plain_is_read_rightly_by_readers_of_alpha_alone(
    models: dict[bool, Path], tmp_path: Path
) -> None:
    """As llama.cpp's converter and PEFT's merging of adapters read: lora_alpha over B's columns."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    updates, logits = {}, {}
    tokens = torch.tensor([[1, 400, 500, 600, 2]])
    for scaling in ("auto", "plain"):
        # Of rank 8 and alpha 8 sqrt(8), which PEFT calls rank-stabilised.
        model = {"lora_rank": 8, "lora_alpha": 22.6274}
        train(write(models, tmp_path / scaling, model=model, adapter_scaling=scaling))
        folder = tmp_path / scaling / "out/adapter"
        stated = json.loads((folder / "adapter_config.json").read_text())
        assert stated["use_rslora"] == (scaling == "auto")
        tensors = load_file(folder / "adapter_model.safetensors")
        updates[scaling] = {
            name: stated["lora_alpha"] / b.shape[1] * b @ tensors[name.replace("_B", "_A")]
            for name, b in tensors.items()
            if "lora_B" in name
        }
        base = AutoModelForCausalLM.from_pretrained(models[True], dtype=torch.float32)
        peft = PeftModel.from_pretrained(base, folder)
        peft.add_weighted_adapter(["default"], [1.0], "alone", combination_type="linear")
        peft.set_adapter("alone")
        with torch.no_grad():
            logits[scaling] = peft(tokens).logits
            peft.set_adapter("default")
            logits[f"{scaling}, itself"] = peft(tokens).logits
    for name, update in updates["plain"].items():
        assert_close(update, 8**0.5 * updates["auto"][name], rtol=1e-4, atol=1e-7)
    assert_close(logits["plain, itself"], logits["auto, itself"], rtol=1e-4, atol=1e-4)
    assert_close(logits["plain"], logits["plain, itself"], rtol=1e-4, atol=1e-4)
