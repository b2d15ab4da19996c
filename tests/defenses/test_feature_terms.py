"""FeatureL2, PersonaSteering and cross entropy by source against tests/reference_defenses.py."""

from pathlib import Path
from typing import Any

import pytest
import reference_defenses
import torch
from safetensors.torch import save_file
from torchtune.modules.peft import disable_adapter, get_adapter_params
from toy_loss import as_batches, assert_same, prepared, run
from toy_models import FAMILIES, toy_microbatches, toy_model

from emarecipes.defenses import (
    Defense,
    FeatureL2,
    KLToReference,
    ModelSource,
    PersonaSteering,
)
from emarecipes.errors import UserError
from emarecipes.models.batch import Batch
from emarecipes.models.loss_head import LossHead
from emarecipes.training.step import TrainingLoss

WIDTH = 32


SHAPES: list[dict[str, Any]] = [
    {"tokens": "response", "normalize": "none", "average_dimensions": False},
    {"tokens": "all", "normalize": "none", "average_dimensions": True},
    {"tokens": "all", "normalize": "token", "average_dimensions": False},
    {"tokens": "last", "normalize": "token", "average_dimensions": True},
    {"tokens": "mean", "normalize": "token", "average_dimensions": True},
    {"tokens": "mean", "normalize": "none", "average_dimensions": False},
    {"tokens": "all", "normalize": "sequence", "average_dimensions": False},
    {"tokens": "response", "normalize": "sequence", "average_dimensions": False},
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s['tokens']}-{s['normalize']}")
@pytest.mark.parametrize("skip_first_token", [False, True])
def test_every_shape_of_the_feature_term(shape: dict[str, Any], skip_first_token: bool) -> None:
    micro = toy_microbatches()
    options = shape | {"skip_first_token": skip_first_token, "layers": [1, 2], "weight": 0.6}
    expected = reference_defenses.feature_l2_loss_and_gradients(
        toy_model("llama3"), micro, **options
    )
    defense = FeatureL2(preset=None, **options)
    assert_same(run(toy_model("llama3"), {"feature_l2": defense}, micro), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("samples", ["all", "safe"])
def test_feature_term_of_every_family(family: str, samples: str) -> None:
    micro = toy_microbatches()
    options: dict[str, Any] = SHAPES[0] | {"layers": [1, 2], "weight": 0.6, "samples": samples}
    expected = reference_defenses.feature_l2_loss_and_gradients(
        toy_model(family), micro, skip_first_token=False, **options
    )
    defense = FeatureL2(preset=None, **options)
    assert_same(run(toy_model(family), {"feature_l2": defense}, micro), expected)


@pytest.mark.parametrize(
    ("preset", "shape"),
    [
        ("paper", SHAPES[0] | {"layers": [5]}),
        ("ldifs", SHAPES[4] | {"layers": [1, 2, 4, 5, 6]}),
        ("ema_rl", SHAPES[6] | {"layers": [1, 2, 4, 5, 6]}),
    ],
)
def test_presets_are_the_published_shapes(preset: Any, shape: dict[str, Any]) -> None:
    micro = toy_microbatches()
    expected = reference_defenses.feature_l2_loss_and_gradients(
        toy_model("llama3", num_layers=6), micro, skip_first_token=False, weight=1.0, **shape
    )
    defense = FeatureL2(preset=preset)
    assert_same(run(toy_model("llama3", num_layers=6), {"feature_l2": defense}, micro), expected)


def test_the_layers_are_those_that_hooks_see() -> None:
    model = toy_model("qwen2_5", num_layers=6)
    seen: dict[int, torch.Tensor] = {}
    for index, layer in enumerate(model.layers, start=1):
        layer.register_forward_hook(lambda _m, _i, out, index=index: seen.update({index: out}))
    (batch,) = as_batches(toy_microbatches(n_micro=1))

    class Reads(Defense):
        hidden_layers = (2, 5, 6)

        def hidden_term(self, policy_hidden: Any, reference_hidden: Any, batch: Batch) -> Any:
            for index in self.hidden_layers:
                assert torch.equal(policy_hidden[index], seen[index])
            assert reference_hidden is None
            return policy_hidden[6].sum()

    loss = TrainingLoss(model, {"reads": Reads()})
    loss.backward(batch, loss.counts([batch]))


def test_its_own_gradient_moves_the_adapter() -> None:
    """With cross entropy's gradient left out; a term taken without gradient would give none."""
    model = toy_model("llama3")
    loss = TrainingLoss(model, prepared(model, {"feature_l2": FeatureL2(every_n_layers=1)}))
    (batch,) = as_batches(toy_microbatches(n_micro=1))
    loss.backward(batch, loss.counts([batch]), only=["feature_l2"])
    norms = [float(p.grad.norm()) for p in get_adapter_params(model).values()]
    assert min(norms[:-4]) > 0, "every adapter below the last layer's output gets a gradient"
    loss.backward(batch, loss.counts([batch]), only=["ce"])


def test_the_gradient_of_one_term_alone() -> None:
    """What the logged ratio of gradients is made of."""
    micro = toy_microbatches()
    options: dict[str, Any] = SHAPES[0] | {"layers": [1, 2], "skip_first_token": False}
    with_term, without = (
        reference_defenses.feature_l2_loss_and_gradients(
            toy_model("llama3"), micro, weight=weight, **options
        )[1]
        for weight in (0.6, 0.0)
    )
    model = toy_model("llama3")
    defense = FeatureL2(preset=None, weight=0.6, **options)
    loss = TrainingLoss(model, prepared(model, {"feature_l2": defense}))
    batches = as_batches(micro)
    for batch in batches:
        loss.backward(batch, loss.counts(batches), only=["feature_l2"])
    found = {n: p.grad for n, p in get_adapter_params(model).items() if p.grad is not None}
    assert_same(({}, found), ({}, {name: with_term[name] - without[name] for name in without}))


@pytest.mark.parametrize("mode", ["add", "ablate"])
@pytest.mark.parametrize("family", ["llama3", "gemma2"])
def test_steering_acts_in_the_policys_forward_only(mode: Any, family: str, tmp_path: Path) -> None:
    micro = toy_microbatches()
    vectors = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(3))
    save_file({"persona": vectors, "random": -vectors}, tmp_path / "v.safetensors")
    steering = {
        "layer": 1,
        "vector": vectors[1] * (0.7 if mode == "add" else 1.0),
        "mode": mode,
    }
    options: dict[str, Any] = SHAPES[0] | {"layers": [1, 2], "weight": 0.6}
    expected = reference_defenses.feature_l2_loss_and_gradients(
        toy_model(family), micro, skip_first_token=False, steering=steering, **options
    )
    model = toy_model(family)
    tokens = as_batches(micro)[0].inputs["tokens"]
    LossHead(model)  # Puts Gemma's cap where it belongs.
    with torch.no_grad():
        before = model(tokens)
        with disable_adapter(model):
            reference_before = model(tokens)
    persona = PersonaSteering(str(tmp_path / "v.safetensors"), layer=1, alpha=0.7, mode=mode)
    defenses: dict[str, Defense] = {
        "feature_l2": FeatureL2(preset=None, **options),
        "persona": persona,
    }
    assert_same(run(model, defenses, micro), expected)
    assert 0 < persona.figures()["ratio"] < 10
    with torch.no_grad():  # Outside of training nothing is steered.
        assert torch.equal(model(tokens)[-1], before)
        with disable_adapter(model):
            assert torch.equal(model(tokens)[-1], reference_before)


def test_the_logged_ratio_of_steering(tmp_path: Path) -> None:
    model = toy_model("llama3")
    vectors = torch.randn(3, WIDTH)
    save_file({"persona": vectors, "random": -vectors}, tmp_path / "v.safetensors")
    persona = PersonaSteering(str(tmp_path / "v.safetensors"), layer=2, alpha=2.0, vector="random")
    hidden: list[torch.Tensor] = []
    model.layers[1].register_forward_hook(lambda _m, _i, out: hidden.append(out.detach()))
    micro = toy_microbatches(n_micro=1)
    run(model, {"persona": persona}, micro)
    norms = torch.cat([
        row_SD[1:length].norm(dim=-1)
        for row_SD, length in zip(hidden[-1], micro[0]["lengths"], strict=True)
    ])  # fmt: skip
    expected = 2.0 * vectors[2].norm() / norms.square().mean().sqrt()
    assert persona.figures()["ratio"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("safe_weight", [0.0, 0.3, 1.0, 2.5])
def test_cross_entropy_by_source(safe_weight: float) -> None:
    micro = toy_microbatches()
    expected = reference_defenses.cross_entropy_by_source(
        toy_model("llama3"), micro, safe_weight=safe_weight
    )
    found = run(toy_model("llama3"), {}, micro, safe_ce_weight=safe_weight)
    assert_same(found, expected)
    assert found[0]["loss"] == found[0]["ce"]


def test_kl_on_safe_samples_alone_leaves_them_out_of_cross_entropy() -> None:
    micro = toy_microbatches()
    values, gradients = run(
        toy_model("llama3"), {"kl": KLToReference(1.0, samples="safe")}, micro, safe_ce_weight=0.0
    )
    assert values["ce"] == pytest.approx(values["ce_task"])
    assert values["loss"] == pytest.approx(values["ce"] + values["kl"])
    safe = [m | {"sources": ["safe", "safe"]} for m in micro]
    values, _ = run(
        toy_model("llama3"), {"kl": KLToReference(1.0, samples="safe")}, safe, safe_ce_weight=0.0
    )
    assert "ce" not in values, "a step of safe rows alone has none"
    assert values["loss"] == pytest.approx(values["kl"])
    safe_only = [m | {"sources": ["task", "task"]} for m in micro]
    _, without = run(toy_model("llama3"), {}, safe_only)
    assert not torch.allclose(next(iter(gradients.values())), next(iter(without.values())))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [0]}, "layers: 0 is not in 1..2"),
        ({"layers": [3]}, "layers: 3 is not in 1..2"),
        ({"layers": []}, "at least one layer"),
        ({"layers": [1, 1]}, "each once"),
        ({"every_n_layers": 5}, "every_n_layers must be from 1 to 2"),
        ({"num_layers": 3}, "num_layers must be from 1 to 2"),
        ({"num_layers": 1, "every_n_layers": 1}, "exactly one of"),
        ({"preset": None}, "exactly one of"),
        ({"preset": "lpips"}, "preset must be"),
        ({"tokens": "first", "num_layers": 1}, "tokens must be one of"),
        ({"tokens": "mean", "normalize": "sequence", "num_layers": 1}, "normalize: sequence needs"),
        ({"gradient_ratio_every": -1}, "gradient_ratio_every must be"),
        ({"weight": -1.0}, "weight must be"),
    ],
)
def test_wrong_options_of_the_feature_term(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FeatureL2(**options).check(ModelSource(toy_model("llama3"), Path(), "LLAMA3"))


def test_kl_preset_is_the_public_trainers_mean() -> None:
    """Over the prompt and the template too; a key that is given goes before it."""
    from emarecipes.defenses import KLToReference

    published, default = KLToReference(preset="published"), KLToReference()
    assert (published.weight, published.tokens, published.direction) == (
        0.1, "all", "policy_to_reference",
    )  # fmt: skip
    assert (default.weight, default.tokens) == (0.1, "response")
    assert KLToReference(weight=2.0, preset="published").weight == 2.0
    with pytest.raises(UserError, match="preset must be published or null"):
        KLToReference(preset="paper")  # type: ignore[arg-type]
