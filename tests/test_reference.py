"""Hand-derived checks of the slow reference loss."""

import math

import pytest
import torch
from reference import (
    adapter_parameters,
    cross_entropy,
    full_logits,
    kl_to_reference,
    loss_and_gradients,
    losses,
    to_float64,
    token_kl,
)
from toy_models import FAMILIES, UNTIED, VOCAB_SIZE, toy_microbatches, toy_model

pytestmark = pytest.mark.usefixtures("one_thread")

KL = {
    "weight": 0.7,
    "direction": "policy_to_reference",
    "tokens": "response",
    "samples": "all",
    "temperature": 1.0,
}


def log_of(*probabilities: float) -> torch.Tensor:
    return torch.tensor([math.log(p) for p in probabilities], dtype=torch.float64)


def test_kl_of_two_coins_by_hand():
    policy = log_of(0.75, 0.25) + 3.0  # a constant on the logits changes nothing
    reference = log_of(0.5, 0.5) - 1.0
    forward = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    backward = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    expected = {
        "policy_to_reference": forward,
        "reference_to_policy": backward,
        "symmetric": (forward + backward) / 2,
    }
    for direction, value in expected.items():
        assert float(token_kl(policy, reference, direction, 1.0)) == pytest.approx(value, abs=1e-15)
    # tau = 2 takes square roots: p = (sqrt 3, 1) / (sqrt 3 + 1)
    p = math.sqrt(3) / (math.sqrt(3) + 1)
    value = p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5)
    assert float(token_kl(policy, reference, "policy_to_reference", 2.0)) == pytest.approx(
        value, abs=1e-15
    )
    # the other way round, so the reference is the one that tau changes
    assert float(token_kl(reference, policy, "reference_to_policy", 2.0)) == pytest.approx(
        value, abs=1e-15
    )
    assert float(token_kl(policy, reference, "symmetric", 1e6)) < 1e-12


def test_means_and_row_choice_by_hand():
    # two micro-batches of one row; vocabulary of 2; row 0 is cut at 3, row 1 at 2
    ignore = -100
    microbatches = [
        {
            "tokens": torch.tensor([[1, 0, 1, 0]]),
            "labels": torch.tensor([[1, ignore, 1, ignore]]),  # only 1 -> 2; position 0 unused
            "lengths": [3],
            "sources": ["task"],
        },
        {
            "tokens": torch.tensor([[0, 1]]),
            "labels": torch.tensor([[ignore, 1]]),
            "lengths": [2],
            "sources": ["safe"],
        },
    ]
    even, tilted, steep = log_of(0.5, 0.5), log_of(0.75, 0.25), log_of(0.9, 0.1)
    policy = [[torch.stack([steep, tilted, steep])], [torch.stack([even, steep])]]
    reference = [[torch.stack([even, even, even])], [torch.stack([tilted, even])]]

    ce = cross_entropy(policy, microbatches)
    assert float(ce) == pytest.approx((math.log(4) + math.log(2)) / 2, abs=1e-15)

    def kl(p: float, r: float) -> float:
        return p * math.log(p / r) + (1 - p) * math.log((1 - p) / (1 - r))

    first, second, third = kl(0.9, 0.5), kl(0.75, 0.5), kl(0.5, 0.75)
    expected = {
        ("response", "all"): (second + third) / 2,
        ("response", "task"): second,
        ("response", "safe"): third,
        ("all", "all"): (first + second + third) / 3,
        ("all", "task"): (first + second) / 2,
        ("all", "safe"): third,
    }
    for (tokens, samples), value in expected.items():
        term = kl_to_reference(
            policy,
            reference,
            microbatches,
            direction="policy_to_reference",
            tokens=tokens,
            samples=samples,
            temperature=1.0,
        )
        assert float(term) == pytest.approx(value, abs=1e-15), (tokens, samples)


def test_uniform_logits_cost_log_vocabulary():
    model = toy_model("llama3")
    torch.nn.init.zeros_(model.output.weight)
    values = losses(model, toy_microbatches())
    assert float(values["ce"].detach()) == pytest.approx(math.log(VOCAB_SIZE), abs=1e-14)
    assert float(values["kl"]) == 0.0
    assert values["loss"] is values["ce"]


@pytest.mark.parametrize("family", FAMILIES)
def test_kl_is_zero_without_adapters_and_symmetric_is_the_mean(family: str):
    model = toy_model(family)
    microbatches = toy_microbatches()
    one, other, both = (
        {name: float(value.detach()) for name, value in losses(model, microbatches, kl).items()}
        for kl in (
            KL,
            {**KL, "direction": "reference_to_policy"},
            {**KL, "direction": "symmetric"},
        )
    )
    assert one["kl"] > 1e-3 and other["kl"] > 1e-3 and abs(one["kl"] - other["kl"]) > 1e-5
    assert both["kl"] == pytest.approx((one["kl"] + other["kl"]) / 2, rel=1e-13)
    assert one["loss"] == pytest.approx(one["ce"] + 0.7 * one["kl"], rel=1e-15)
    for name, parameter in adapter_parameters(model).items():
        if name.endswith("lora_b.weight"):
            torch.nn.init.zeros_(parameter)
    assert float(losses(model, microbatches, KL)["kl"].detach()) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_agrees_with_torchtune(family: str, dora: bool):
    model = toy_model(family, lora_output=family in UNTIED, dora=dora)
    micro = toy_microbatches(n_micro=1)[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    length = micro["lengths"][1]
    logits = full_logits(model, micro["tokens"][1:2, :length], adapters_on=True)
    base = full_logits(model, micro["tokens"][1:2, :length], adapters_on=False)
    cap = None
    if family == "gemma2":  # torchtune's own forward without its misplaced cap, then ours
        cap = model.norm.capping_value
        model.norm.logit_capping = torch.nn.Identity()
    with torch.no_grad():
        theirs = model(micro["tokens"])[1, :length].double()  # padded batch
    if cap is not None:
        assert theirs.abs().max() > cap > logits.abs().max()
        theirs = cap * torch.tanh(theirs / cap)
    torch.testing.assert_close(logits.detach(), theirs, atol=2e-5, rtol=2e-5)
    assert (logits - base).abs().max() > 0.1
    assert not base.requires_grad
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, before[name])


@pytest.mark.parametrize("direction", ["policy_to_reference", "reference_to_policy", "symmetric"])
@pytest.mark.parametrize("family", ["llama3", "qwen2_tied", "gemma2"])
def test_gradient_by_finite_differences(family: str, direction: str):
    kl = {**KL, "direction": direction, "tokens": "all", "temperature": 1.5, "weight": 3.0}
    double = to_float64(toy_model(family))
    microbatches = toy_microbatches(n_micro=2, batch=1)
    _, gradients = loss_and_gradients(double, microbatches, kl)
    assert set(gradients) == {n for n, p in double.named_parameters() if p.requires_grad}
    step = 1e-5
    for name in ("layers.0.attn.q_proj.lora_a.weight", "layers.1.mlp.w2.lora_b.weight"):
        weight = double.get_parameter(name).data
        value = float(weight[1, 2])
        ends = []
        for signed in (step, -step):
            weight[1, 2] = value + signed
            with torch.no_grad():
                ends.append(float(losses(double, microbatches, kl)["loss"]))
        weight[1, 2] = value
        expected = (ends[0] - ends[1]) / (2 * step)
        # only a forward that is float64 throughout is this close
        assert float(gradients[name][1, 2]) == pytest.approx(expected, rel=1e-6, abs=1e-9)
