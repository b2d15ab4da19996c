"""Adapters held in fp32 over a bf16 base: the same products, and updates that are not lost."""

from pathlib import Path
from typing import Any

import pytest
import torch
import toy_run
from ranks import run_ranks
from safetensors.torch import load_file
from torch import nn
from torchtune.modules.peft import DoRALinear, get_adapter_params
from toy_models import toy_microbatches, toy_model

from emarecipes.models._adapter_dtype import hold_adapter_in
from emarecipes.models._torchtune_convert import fix_dora_bias
from emarecipes.training import run_lora

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("family", ["llama3_2", "qwen2_5", "phi3"])
def test_products_and_gradients_are_those_of_the_rounded_adapter(family: str) -> None:
    """Of a model that is all bf16, as torchtune's; only the adapter's own values are finer."""
    rounded, held = toy_model(family).to(BF16), toy_model(family).to(BF16)
    hold_adapter_in(held, FP32)
    (batch,) = toy_microbatches(n_micro=1)
    for name, parameter in get_adapter_params(held).items():
        assert parameter.dtype == FP32
        # Finer than bf16, and rounded to what the other model has.
        parameter.data += 2**-11 * parameter.data.abs()
        assert not parameter.equal(get_adapter_params(rounded)[name].float()), name
    outputs = []
    for model in (rounded, held):
        logits = model(batch["tokens"])
        torch.log_softmax(logits.float(), dim=-1)[..., 0].sum().backward()
        outputs.append(logits)
    assert outputs[0].equal(outputs[1])
    for name, parameter in get_adapter_params(held).items():
        expected = get_adapter_params(rounded)[name].grad
        assert expected is not None
        assert parameter.grad is not None
        assert parameter.grad.dtype == FP32
        assert parameter.grad.equal(expected.float()), name


@pytest.mark.parametrize("family", ["llama3_2", "qwen2_5"])
def test_dora_starts_as_in_bf16_and_stays_near_the_fp32_model(family: str) -> None:
    """Qwen's layers have biases, whose DoRA is this package's own."""
    exact, held = toy_model(family, dora=True), toy_model(family, dora=True)
    tokens = toy_microbatches(n_micro=1)[0]["tokens"]
    for model in (exact, held):
        fix_dora_bias(model)
    held.to(BF16)
    hold_adapter_in(held, FP32)
    with torch.no_grad():
        expected, found = exact(tokens), held(tokens)
        assert (found - expected).norm() < 0.05 * expected.norm()

        fresh = toy_model(family, dora=True).to(BF16)
        fix_dora_bias(fresh)
        layers = [m for m in fresh.modules() if isinstance(m, DoRALinear)]
        for layer in layers:
            layer.lora_b.weight.zero_()
            layer.initialize_dora_magnitude()
        start = fresh(tokens)
        hold_adapter_in(fresh, FP32)
        assert fresh(tokens).equal(start)
        for layer in layers:
            assert layer.magnitude.dtype == FP32
            assert layer(torch.ones(1, layer.in_dim, dtype=BF16)).dtype == BF16


def test_an_adapter_of_the_bases_own_precision_is_left_alone() -> None:
    model = toy_model("llama3_2", dora=True)
    before = {name: type(module) for name, module in model.named_modules()}
    hold_adapter_in(model, FP32)
    hold_adapter_in(model.to(BF16), None)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert {p.dtype for p in model.parameters()} == {BF16}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("toy")
    model = toy_run.write_toy_model(folder / "model", model_dir)
    config = toy_run.toy_config(model, toy_run.write_rows(folder / "rows.jsonl"), folder)
    config["tokenizer"]["max_seq_len"] = 64
    return config | {
        "batch_size": 2,
        "dtype": "bf16",
        "adapter_dtype": "fp32",
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 3e-5, "weight_decay": 0.0},
        "lr_scheduler": None,
        "metric_logger": None,
        "clip_grad_norm": "inf",
        "epochs": 2,
        "defenses": {"kl": {"_component_": "emarecipes.defenses.KLToReference", "weight": 0.5}},
    }


def train(toy: dict[str, Any], folder: Path, *overrides: str, processes: int = 0) -> Any:
    folder.mkdir()
    config = toy_run.write_config(folder / "config.yaml", toy | {"output_dir": str(folder / "out")})
    if processes:
        done = run_ranks(config, *overrides, processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        assert run_lora(["--config", str(config), *overrides]) == 0
    adapter = load_file(folder / "out/adapter/adapter_model.safetensors")
    return toy_run.metrics(folder / "out"), adapter


UNTRAINED = ("optimizer.lr=0", "epochs=1", "max_steps_per_epoch=1")


def distance(one: dict[str, Any], other: dict[str, Any], letter: str = "lora_A") -> float:
    pairs = [(one[k].double(), other[k].double()) for k in one if letter in k]
    return float(sum((a - b).square().sum() for a, b in pairs)) ** 0.5


def test_small_updates_and_decay_arrive(toy: dict[str, Any], tmp_path: Path) -> None:
    """A's movement at a small learning rate, against a run that is all fp32, and against none."""
    _, start = train(toy, tmp_path / "start", *UNTRAINED)
    moved: dict[str, float] = {}
    adapters: dict[str, Any] = {}
    for name, overrides in {
        "fp32": ["dtype=fp32"],
        "held in fp32": [],
        "held in bf16": ["adapter_dtype=null"],
    }.items():
        _, adapter = train(toy, tmp_path / name, *overrides)
        adapters[name] = adapter
        assert {t.dtype for t in adapter.values()} == {BF16 if "bf16" in name else FP32}
        moved[name] = distance(adapter, start)
    assert moved["held in fp32"] == pytest.approx(moved["fp32"], rel=0.1)
    assert moved["held in bf16"] != pytest.approx(moved["fp32"], rel=0.3)

    shrunk = {}
    for held, name in (("fp32", "held in fp32"), ("null", "held in bf16")):
        decay = [f"adapter_dtype={held}", "optimizer.weight_decay=1.0"]
        _, decayed = train(toy, tmp_path / f"{name}, decayed", *decay)
        shrunk[held] = distance(adapters[name], decayed)
    # Ten steps of 3e-5 times the weights' own norm.
    norm = distance(start, {k: torch.zeros_like(t) for k, t in start.items()})
    assert shrunk["fp32"] == pytest.approx(10 * 3e-5 * norm, rel=0.3)
    assert shrunk["null"] == 0.0


def test_two_processes_train_and_store_what_one_does(toy: dict[str, Any], tmp_path: Path) -> None:
    toy = toy | {"optimizer": {"_component_": "torch.optim.AdamW", "lr": 2e-3}}
    rows, adapter = train(toy, tmp_path / "one")
    found, other = train(toy, tmp_path / "two", "batch_size=1", processes=2)
    # In bf16 a gradient's rounding is by its rows' number, and by the CPU's kind of product.
    for key, tolerance in (("loss", 2e-2), ("ce", 2e-2), ("grad_norm", 5e-2)):
        expected = [row[key] for row in rows]
        assert [row[key] for row in found] == pytest.approx(expected, rel=tolerance), key
    assert {tensor.dtype for tensor in other.values()} == {FP32}
    _, start = train(toy, tmp_path / "start", *UNTRAINED)
    assert distance(adapter, other) < 0.2 * distance(adapter, start)


def test_it_resumes_bit_for_bit_and_in_its_own_precision_alone(
    toy: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, adapter = train(toy, tmp_path / "a", "save_every_n_steps=4", "keep_last=9")
    checkpoint = tmp_path / "a/out/checkpoints/step_4"
    assert {t.dtype for t in load_file(checkpoint / "adapter.safetensors").values()} == {FP32}
    resumed_rows, resumed = train(toy, tmp_path / "b", f"resume={checkpoint}")
    assert all(tensor.equal(resumed[name]) for name, tensor in adapter.items())
    assert [row["loss"] for row in resumed_rows] == [row["loss"] for row in rows]
    config = str(tmp_path / "a/config.yaml")
    overrides = [f"resume={checkpoint}", "adapter_dtype=null", f"output_dir={tmp_path}/c"]
    assert run_lora(["--config", config, *overrides]) == 1
    assert "adapter_dtype: 'fp32' -> None" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_decay_that_moves_no_number_is_said(
    toy: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: str
) -> None:
    """Just below and above the least decay that moves some number of [1, 2), as torch has them."""
    bits, kind, whole = (7, BF16, torch.int16) if dtype == "bf16" else (23, FP32, torch.int32)
    numbers = torch.arange(0, 2 ** min(bits, 12), dtype=whole)
    numbers = (numbers + torch.ones(1, dtype=kind).view(whole)).view(kind)
    for decay in (0.9 * 2.0 ** -(bits + 2), 1.1 * 2.0 ** -(bits + 2)):
        weights = nn.Parameter(numbers.clone())
        weights.grad = torch.zeros_like(weights)
        torch.optim.AdamW([weights], lr=0.5, weight_decay=2 * decay).step()
        caplog.clear()
        train(toy, tmp_path / str(decay), f"adapter_dtype={'null' if dtype == 'bf16' else dtype}",
              "optimizer.lr=0.5", f"optimizer.weight_decay={2 * decay}", "epochs=1",
              "max_steps_per_epoch=1")  # fmt: skip
        lost = f"an adapter held in {dtype} loses what is below" in caplog.text
        assert lost == weights.equal(numbers) == (decay < 2.0 ** -(bits + 2))


@pytest.mark.parametrize(
    "changes",
    [
        {"apply_lora_to_output": True},
        {"apply_lora_to_output": True, "use_dora": True},
        pytest.param(
            {"enable_activation_checkpointing": True, "compile": True}, marks=pytest.mark.long
        ),
    ],
    ids=["lora on output", "dora", "checkpointing, compiled"],
)
def test_torchtunes_options_beside_it(
    toy: dict[str, Any], tmp_path: Path, model_dir: Path, changes: dict[str, Any]
) -> None:
    """Each trains near the run that is all fp32, on one process and on two."""
    toy = toy | {"optimizer": {"_component_": "torch.optim.AdamW", "lr": 2e-3}, "epochs": 1}
    toy |= {key: value for key, value in changes.items() if key in toy}
    of_model = {key: value for key, value in changes.items() if key not in toy}
    if of_model:
        folder = toy_run.write_toy_model(tmp_path / "model", model_dir, tied=False)
        model = {k: v for k, v in toy["model"].items() if k != "scale_factor"}
        component = {"_component_": "torchtune.models.llama3.lora_llama3"}
        toy |= {
            "model": model | of_model | component,
            "checkpointer": toy["checkpointer"]
            | {"checkpoint_dir": str(folder), "model_type": "LLAMA3"},
        }
    expected, _ = train(toy, tmp_path / "fp32", "dtype=fp32", "compile=false")
    for name, overrides, processes in (("one", [], 0), ("two", ["batch_size=1"], 2)):
        rows, adapter = train(toy, tmp_path / name, *overrides, processes=processes)
        assert {tensor.dtype for tensor in adapter.values()} == {FP32}
        for key in ("ce", "grad_norm"):
            wanted = [row[key] for row in expected]
            assert [row[key] for row in rows] == pytest.approx(wanted, rel=0.1), (name, key)
