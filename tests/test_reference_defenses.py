"""Hand-derived checks of the slow references of the defenses."""

import math
from typing import Any

import pytest
import torch
from reference import adapter_parameters, forward_row, full_logits, loss_and_gradients, to_float64
from reference_defenses import (
    cross_entropy_by_source,
    feature_l2,
    feature_l2_loss_and_gradients,
    steer_with,
)
from toy_models import VOCAB_SIZE, toy_microbatches, toy_model

pytestmark = pytest.mark.usefixtures("one_thread")

COMBINATIONS = [
    *[(t, n) for t in ("response", "all") for n in ("none", "token", "sequence")],
    *[(t, n) for t in ("last", "mean") for n in ("none", "token")],
]


OPTIONS: dict[str, Any] = {
    "weight": 2.0,
    "layers": [0, 1, 2],
    "tokens": "all",
    "skip_first_token": False,
    "normalize": "none",
    "average_dimensions": False,
}


def double(*rows: Any) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def no_adapter(model: torch.nn.Module) -> torch.nn.Module:
    for name, parameter in adapter_parameters(model).items():
        if name.endswith("lora_b.weight"):
            torch.nn.init.zeros_(parameter)
    return model


# Row 0 (task, length 3 of 4): labels at 0 (no predictor), 1 and 2, so positions 0 and 1 answer.
# Row 1 (safe, length 2): the label at 1, so position 0 answers. Row 2 (safe): no label.
HAND_ROWS = [
    {
        "tokens": torch.tensor([[1, 2, 3, 0]]),
        "labels": torch.tensor([[1, 2, 3, -100]]),
        "lengths": [3],
        "sources": ["task"],
    },
    {
        "tokens": torch.tensor([[1, 2], [1, 0]]),
        "labels": torch.tensor([[-100, 2], [-100, -100]]),
        "lengths": [2, 1],
        "sources": ["safe", "safe"],
    },
]


# Index 0 is the same in both models; index 1 differs.
SAME = [[[double([1.0, 1.0])]], [[double([1.0, 1.0])], [double([1.0, 1.0])]]]


POLICY = [
    [[SAME[0][0][0].expand(3, 2), double([3.0, 4.0], [0.0, 2.0], [7.0, 0.0])]],
    [
        [SAME[1][0][0].expand(2, 2), double([0.0, 0.0], [1.0, 0.0])],
        [SAME[1][1][0], double([5.0, 0.0])],
    ],
]


REFERENCE = [
    [[SAME[0][0][0].expand(3, 2), double([3.0, 0.0], [2.0, 0.0], [0.0, 7.0])]],
    [
        [SAME[1][0][0].expand(2, 2), double([0.0, 5.0], [1.0, 0.0])],
        [SAME[1][1][0], double([6.0, 0.0])],
    ],
]


# |(.6, .8) - (1, 0)|^2 = .8; |(0, 1) - (1, 0)|^2 = 2; |0 - (0, 1)|^2 = 1
FLAT = 2 - 2 * 9 / math.sqrt(29 * 13)  # row 0: (3, 4, 0, 2) to (3, 0, 2, 0)


FLAT_ALL = 2 - 2 * 9 / math.sqrt(78 * 62)  # row 0: (3, 4, 0, 2, 7, 0) to (3, 0, 2, 0, 0, 7)


FLAT_SAFE = 2 - 2 * 1 / math.sqrt(1 * 26)  # row 1: (0, 0, 1, 0) to (0, 5, 1, 0)


MEAN = 2 - 2 * 1 / math.sqrt(1 + 4)  # row 0: direction (1, 2) to (1, 0)


BY_HAND = [
    ("response", "none", False, "all", (16 + 8 + 25) / 3),
    ("response", "none", True, "all", 8.0),
    ("response", "none", False, "task", (16 + 8) / 2),
    ("response", "none", True, "safe", 0.0),
    ("response", "token", False, "all", (0.8 + 2 + 1) / 3),
    ("response", "sequence", False, "all", (FLAT + 1) / 2),
    ("response", "sequence", True, "all", 2.0),
    ("all", "none", False, "all", (16 + 8 + 98 + 25 + 0 + 1) / 6),
    ("all", "none", True, "all", (8 + 98 + 0) / 3),
    ("all", "token", False, "all", (0.8 + 2 + 2 + 1 + 0 + 0) / 6),
    ("all", "token", False, "safe", 1 / 3),
    ("all", "sequence", False, "all", (FLAT_ALL + FLAT_SAFE + 0) / 3),
    ("last", "none", False, "all", (8 + 25) / 2),
    ("last", "none", True, "all", 8.0),
    ("last", "token", False, "all", (2 + 1) / 2),
    ("mean", "none", False, "all", (1 + 9 + 25) / 2),  # (1.5, 3) to (2.5, 0)
    ("mean", "none", True, "all", 8.0),
    ("mean", "token", False, "task", MEAN),
]


@pytest.mark.parametrize("tokens, normalize, skip, samples, expected", BY_HAND)
def test_feature_l2_by_hand(tokens: str, normalize: str, skip: bool, samples: str, expected: float):
    if (tokens, normalize) == ("mean", "token"):  # (1.5, 3) to (2.5, 0)
        assert expected == pytest.approx((1 / math.sqrt(5) - 1) ** 2 + 4 / 5, abs=1e-15)
    for layers, average, scale in (
        ([1], False, 1.0),
        ([0, 1], False, 1.0),
        ([1], True, 1 / 2),
        ([0, 1], True, 1 / 4),
    ):
        term = feature_l2(
            POLICY, REFERENCE, HAND_ROWS, layers, tokens, skip, normalize, average, samples
        )
        assert float(term) == pytest.approx(scale * expected, abs=1e-14), (layers, average)


def test_zero_vectors_have_a_finite_gradient():
    for tokens, normalize in COMBINATIONS:
        zero = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
        micro = {
            "tokens": torch.tensor([[1, 2]]),
            "labels": torch.tensor([[-100, 2]]),
            "lengths": [2],
            "sources": ["task"],
        }
        other = double([1.0, 0.0], [0.0, 1.0])
        term = feature_l2([[[zero]]], [[[other]]], [micro], [0], tokens, False, normalize, False)
        (gradient,) = torch.autograd.grad(term, zero)
        assert torch.isfinite(term) and torch.isfinite(gradient).all(), (tokens, normalize)


@pytest.mark.parametrize("tokens, normalize", COMBINATIONS)
def test_feature_term_is_zero_without_adapter(tokens: str, normalize: str):
    model, microbatches = no_adapter(toy_model("llama3")), toy_microbatches()
    options = {**OPTIONS, "tokens": tokens, "normalize": normalize}
    values, gradients = feature_l2_loss_and_gradients(model, microbatches, **options)
    plain, plain_gradients = loss_and_gradients(model, microbatches)
    assert values["feature_l2"] == pytest.approx(0.0, abs=1e-20)
    assert values["ce"] == values["loss"] == pytest.approx(plain["ce"], rel=1e-14)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain_gradients[name], atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_steering_shifts_only_the_policy_at_its_index(layer: int):
    model, microbatches = to_float64(no_adapter(toy_model("gemma2"))), toy_microbatches()
    vector = torch.linspace(-1, 1, 32)
    steering = {"layer": layer, "vector": vector, "mode": "add"}
    options = {**OPTIONS, "layers": [layer], "steering": steering}
    square = float((vector.double() ** 2).sum())
    values, _ = feature_l2_loss_and_gradients(model, microbatches, **options)
    assert values["feature_l2"] == pytest.approx(square, rel=1e-12)
    options["average_dimensions"] = True
    values, _ = feature_l2_loss_and_gradients(model, microbatches, **options)
    assert values["feature_l2"] == pytest.approx(square / 32, rel=1e-12)
    assert abs(values["ce"] - loss_and_gradients(model, microbatches)[0]["ce"]) > 1e-4
    if layer > 0:
        options["layers"] = [layer - 1]
        values, _ = feature_l2_loss_and_gradients(model, microbatches, **options)
        assert values["feature_l2"] == 0.0

    # ablation takes the component out, whatever the length of the vector
    row = microbatches[0]["tokens"][:1, :7]
    plain = forward_row(model, row, adapters_on=True)[1]
    for scale in (1.0, 32.0):  # a power of two, exact in fp32
        steer = steer_with({**steering, "vector": scale * vector, "mode": "ablate"})
        ablated = forward_row(model, row, adapters_on=True, steer=steer)[1]
        unit = vector.double() / math.sqrt(square)
        assert (ablated[layer] @ unit).abs().max() < 1e-13
        expected = plain[layer] - torch.outer(plain[layer] @ unit, unit)
        torch.testing.assert_close(ablated[layer], expected, atol=1e-13, rtol=0)


def test_residual_stream_is_what_the_layers_read_and_write():
    model = to_float64(toy_model("qwen2_5"))
    row = toy_microbatches()[0]["tokens"][:1, :6]
    read: list[torch.Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0][0]))
        for module in [*model.layers, model.norm]
    ]
    logits, residuals = forward_row(model, row, adapters_on=True)
    for hook in hooks:
        hook.remove()
    assert len(residuals) == len(read) == 3
    assert all(torch.equal(one, other) for one, other in zip(residuals, read, strict=True))
    assert torch.equal(logits, full_logits(model, row, adapters_on=True))


STEERINGS = (None, {"layer": 1, "mode": "add"}, {"layer": 1, "mode": "ablate"})


def assert_finite_differences(model: torch.nn.Module, gradients: Any, value: Any) -> None:
    """Check one entry of two adapter matrices; ``value()`` evaluates the loss anew."""
    step = 1e-5
    for name in ("layers.0.attn.q_proj.lora_a.weight", "layers.1.mlp.w2.lora_b.weight"):
        weight = model.get_parameter(name).data
        start = float(weight[1, 2])
        ends = []
        for signed in (step, -step):
            weight[1, 2] = start + signed
            ends.append(value())
        weight[1, 2] = start
        expected = (ends[0] - ends[1]) / (2 * step)
        assert float(gradients[name][1, 2]) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("steering", STEERINGS, ids=("plain", "add", "ablate"))
@pytest.mark.parametrize("tokens, normalize", COMBINATIONS)
def test_feature_gradient_by_finite_differences(
    tokens: str, normalize: str, steering: dict[str, Any] | None
):
    number = COMBINATIONS.index((tokens, normalize))
    model = to_float64(toy_model(("llama3", "qwen2_tied", "gemma2")[number % 3]))
    microbatches = toy_microbatches(n_micro=2, batch=1)
    if steering is not None:
        steering = {**steering, "vector": torch.linspace(-1, 1, 32)}
    options = {
        **OPTIONS,
        "tokens": tokens,
        "normalize": normalize,
        "skip_first_token": number % 2 == 1,
        "average_dimensions": number % 4 == 2,
        # the only safe row has one label, which the other sets still reach
        "samples": ("all", "task", "safe")[number % 3],
        "steering": steering,
    }

    def value() -> float:
        return feature_l2_loss_and_gradients(model, microbatches, **options)[0]["loss"]

    values, gradients = feature_l2_loss_and_gradients(model, microbatches, **options)
    assert values["feature_l2"] > 1e-4
    assert values["loss"] == pytest.approx(values["ce"] + 2 * values["feature_l2"], rel=1e-14)
    assert set(gradients) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert_finite_differences(model, gradients, value)


def test_cross_entropy_by_source():
    model, microbatches = to_float64(toy_model("llama3")), toy_microbatches()
    counts = {"task": 0, "safe": 0}
    for micro in microbatches:
        for b, source in enumerate(micro["sources"]):
            counts[source] += int((micro["labels"][b, 1:] != -100).sum())
    assert counts["task"] != counts["safe"] > 0
    plain, plain_gradients = loss_and_gradients(model, microbatches)
    one, gradients = cross_entropy_by_source(model, microbatches, 1.0)
    assert one["ce"] == pytest.approx(plain["ce"], rel=1e-14)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain_gradients[name], atol=1e-14, rtol=1e-10)
    assert cross_entropy_by_source(model, microbatches, 0.0)[0]["ce"] == pytest.approx(
        one["ce_task"], rel=1e-14
    )
    weighted, gradients = cross_entropy_by_source(model, microbatches, 2.5)
    total = counts["task"] * one["ce_task"] + 2.5 * counts["safe"] * one["ce_safe"]
    expected = total / (counts["task"] + 2.5 * counts["safe"])
    assert weighted["ce"] == pytest.approx(expected, rel=1e-14)
    assert abs(weighted["ce"] - one["ce"]) > 1e-4
    assert_finite_differences(
        model, gradients, lambda: cross_entropy_by_source(model, microbatches, 2.5)[0]["ce"]
    )

    safe_only = [{**micro, "sources": ["safe", "safe"]} for micro in microbatches]
    values, gradients = cross_entropy_by_source(model, safe_only, 0.0)
    assert values == {"ce": 0.0, "ce_task": 0.0, "ce_safe": pytest.approx(one["ce"])}
    assert all(not gradient.any() for gradient in gradients.values())

    torch.nn.init.zeros_(model.output.weight)
    uniform = math.log(VOCAB_SIZE)
    values, _ = cross_entropy_by_source(model, microbatches, 0.3)
    assert values == {name: pytest.approx(uniform) for name in ("ce", "ce_task", "ce_safe")}
