"""Hand-derived checks of the slow references of the weight, token, prefix and gradient defenses."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import KeepFloat64, adapter_modules, adapters, forward_row, to_float64
from reference_new_defenses import (
    ablate_with,
    adapter_ema,
    anchored_sft,
    asft_penalty,
    direction_block,
    dot_latents,
    inoculated,
    prefix_anchor,
    prefix_keys_values,
    published_beta,
    spectral_penalty,
    spectrum,
    surgery,
    token_constraint,
)
from toy_models import toy_model


def double(*rows: Any) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def same(value: torch.Tensor, *expected: float) -> None:
    assert value.detach().flatten().tolist() == pytest.approx(list(expected), abs=1e-12)


def slope(value: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value, [leaf])[0]


def assert_gradient(value: Callable[[], torch.Tensor], *leaves: torch.Tensor) -> None:
    """Autograd against central differences with a step of 1e-5."""
    gradients = torch.autograd.grad(value(), leaves)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert gradient.abs().max() > 1e-4
        for i in range(leaf.numel()):
            ends = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    leaf.view(-1)[i] += step
                    ends.append(float(value()))
                    leaf.view(-1)[i] -= step
            central = (ends[0] - ends[1]) / 2e-5
            assert float(gradient.view(-1)[i]) == pytest.approx(central, abs=1e-8)


# Row 0 (task) predicts at 0, 1 and, after an unlabelled token, 3; row 1 (safe) at 0 alone, then
# two positions of padding; row 2 has no label.
ROWS = [
    {
        "tokens": torch.zeros(2, 5, dtype=torch.long),
        "labels": torch.tensor([[-100, 0, 0, -100, 0], [-100, 1, -100, -100, -100]]),
        "lengths": [5, 3],
        "sources": ["task", "safe"],
    },
    {
        "tokens": torch.zeros(1, 5, dtype=torch.long),
        "labels": torch.full((1, 5), -100),
        "lengths": [5],
        "sources": ["safe"],
    },
]


def logits(*odds: float) -> list[list[torch.Tensor]]:
    """Two words, the odds of word 0 at row 0's five positions; row 1 has even odds."""
    leaf = torch.tensor([[math.log(x), 0.0] for x in odds], dtype=torch.float64, requires_grad=True)
    return [
        [leaf, torch.zeros(3, 2, dtype=torch.float64)],
        [torch.zeros(5, 2, dtype=torch.float64)],
    ]


# At position 0 the policy has 3/4 for the target and the reference 1/2.
POLICY, EVEN = logits(3, 1, 1, 1, 1), logits(1, 1, 1, 1, 1)


def two(place: int) -> float:
    return 2.0


def test_spectral_penalty_by_hand():
    # singular values 3 and 4: 5 / 7; rank one: 1; zero: left out or counted
    a, b = double([1, 0], [0, 1]).requires_grad_(), double([3, 0], [0, 4], [0, 0]).requires_grad_()
    lora = {"two": (a, b), "one": (double([3, 4]), double([1], [2])), "none": (a, 0 * b)}
    same(spectral_penalty(lora), 6 / 7)
    same(spectral_penalty(lora, "all"), 4 / 7)
    assert float(spectral_penalty({"none": (a, 0 * b)})) == 0
    # d (F / N) / d s_i = s_i / (F N) - F / N^2
    same(slope(spectral_penalty({"two": (a, b)}), b), -4 / 245, 0, 0, 3 / 245, 0, 0)
    assert spectrum(a, b) == pytest.approx({"stable_rank": 25 / 16, "entropy": 0.6829081047004717})
    squares = -(0.36 * math.log(0.36) + 0.64 * math.log(0.64))
    assert spectrum(a, b, power=2)["entropy"] == pytest.approx(squares)


def test_asft_by_hand():
    # C = diag(9, 16) / 5, so I - C = diag(-0.8, -2.2); s B A = [[2, 4], [2, 4]]
    a, b = double([1, 2]).requires_grad_(), double([1], [1]).requires_grad_()
    lora, base = {"w": (a, b)}, {"w": double([5, 6], [7, 8])}
    aligned = {"w": base["w"] + double([3, 0], [0, 4])}
    term = asft_penalty(lora, aligned, base, 2.0)
    same(term, 109.6)
    to_a, to_b = torch.autograd.grad(term, [a, b])
    same(to_a, 43.84, 87.68)
    same(to_b, 25.6, 193.6)
    # V V^T, not V^T V: C = diag(sqrt 5, 0), on three inputs; 7 - 2 sqrt 5
    wide = {"w": (double([1, 0, 0]), b), "v": (double([0, 0, 0]), b)}
    v, nothing = double([1, 2, 0], [0, 0, 0]), torch.zeros(2, 3)
    pair = {"w": v, "v": v}, {"w": nothing, "v": nothing}
    same(asft_penalty(wide, *pair, 1.0), 2.5278640450004204)
    same(asft_penalty(wide, *pair, 1.0, "mean"), 1.2639320225002102)


def test_weight_terms_by_finite_differences():
    torch.manual_seed(0)
    a, b = (torch.randn(*shape).double().requires_grad_() for shape in ((2, 4), (3, 2)))
    v = {"w": torch.randn(3, 4).double()}
    assert_gradient(lambda: spectral_penalty({"w": (a, b)}), a, b)
    assert_gradient(lambda: asft_penalty({"w": (a, b)}, v, {"w": 0 * v["w"]}, 0.5), a, b)


def test_token_constraint_by_hand():
    assert [published_beta(t) for t in (1, 2, 5, 6, 99)] == [0.5, 2, 2, 0.1, 0.1]
    # beta 2 at p / r = 3 / 2: sigma(2 ln 1.5) = 9 / 13; elsewhere p = r: (2 / 2) ln 2
    batch = POLICY, EVEN, ROWS
    first, rest = math.log(13 / 9), math.log(2)
    for reduction, expected in (
        ("sum", first + 3 * rest),
        ("mean", (first + 3 * rest) / 4),
        ("row_mean", ((first + 2 * rest) / 3 + rest) / 2),
    ):
        same(token_constraint(*batch, beta=two, reduction=reduction), expected)
    assert float(token_constraint(*batch, beta=two, samples="safe")) == pytest.approx(rest)
    # d / d log p = -2 (1 - 9 / 13), times 1 - p = 1 / 4; at p = r as cross entropy, -1 (1 - 1 / 2)
    for floor in (None, 0.0, 1e-3):
        value = token_constraint(*batch, beta=two, floor=floor, reduction="sum")
        same(slope(value, POLICY[0][0]), -2 / 13, 2 / 13, -0.5, 0.5, 0, 0, -0.5, 0.5, 0, 0)
    # the value of the weighted form at position 0, and the floor where p is far above r
    value = token_constraint(*batch, beta=two, floor=0.0, reduction="sum", samples="task")
    same(value, 8 / 13 * math.log(4 / 3) + 2 * math.log(2))
    far = logits(1e9, 1, 1, 1, 1)
    value = token_constraint(far, EVEN, ROWS, beta=lambda t: 40.0, floor=0.5, samples="task")
    assert float(slope(value, far[0][0])[0, 0]) == pytest.approx(-0.5 / (1e9 + 1) / 3, rel=1e-9)


@pytest.mark.parametrize(("restart", "third"), [(False, 3), (True, 1)])
def test_places_count_the_answer(restart: bool, third: int):
    # the place as beta; p / r = 3 / 2 at the second place, else p = r: 2 / beta ln 2
    value = token_constraint(logits(1, 3, 1, 1, 1), EVEN, ROWS, beta=float, restart=restart)
    same(value, (math.log(13 / 9) + (2 + 2 / third + 2) * math.log(2)) / 4)


def test_anchored_sft_by_hand():
    # position 0: 3/4 ln(4/3) and KL = 1/2 ln(4/3); the other three: 1/2 ln 2 and 0
    same(anchored_sft(POLICY, EVEN, ROWS, weight=1.0), 0.3498308403512)
    value = anchored_sft(POLICY, EVEN, ROWS, weight=1.0, reduction="sum")
    # -p (1 - p) + (p - r) = 0.0625
    same(slope(value, POLICY[0][0]), 0.0625, -0.0625, -0.25, 0.25, 0, 0, -0.25, 0.25, 0, 0)
    free = anchored_sft(POLICY, EVEN, ROWS, weight=0.0, reduction="sum", stop=False)
    same(slope(free, POLICY[0][0])[0], -0.1335596114153, 0.1335596114153)  # -(1 + ln p) p (1 - p)


def test_token_terms_by_finite_differences():
    torch.manual_seed(0)
    policy, reference = (
        [[torch.randn(5, 4).double(), torch.randn(3, 4).double()], [torch.randn(5, 4).double()]]
        for _ in range(2)
    )
    leaf = policy[0][0].requires_grad_()
    assert_gradient(lambda: token_constraint(policy, reference, ROWS), leaf)
    assert_gradient(lambda: anchored_sft(policy, reference, ROWS, weight=0.7, stop=False), leaf)


def test_prefix_anchor_by_hand():
    # first token: |(0, 5)|^2 / 25 = 1 and 0.5^2 / 1; second token and second layer: no drift
    k, v = double([3, 4], [1, 1]), double([1, 0], [2, 2])
    moved = (k + double([0, 5], [0, 0])).requires_grad_(), v + double([0, 0.5], [0, 0])
    batch = [moved, (v, k)], [(k, v), (v, k)]
    for options, expected in (
        ({}, 0.3125),
        ({"over_layers": "sum"}, 0.625),
        ({"weight": 2.0, "threshold": 0.1}, 0.525),
        ({"weight": 2.0, "threshold": 0.1, "threshold_of": "term"}, 0.425),
        ({"threshold": 0.4}, 0.0),
    ):
        same(prefix_anchor(*batch, **options), expected)
    # 4 * 2 * 5 / 25, over two tokens and two layers
    same(slope(prefix_anchor(*batch, weight=4.0), moved[0]), 0, 0.4, 0, 0)


def test_prefix_keys_are_what_attention_projects():
    model = to_float64(toy_model("llama3"))
    seen: list[torch.Tensor] = []
    for layer in model.layers:
        for projection in (layer.attn.k_proj, layer.attn.v_proj):
            projection.register_forward_hook(lambda _, __, out: seen.append(out[0, :3].detach()))
    _, residuals = forward_row(model, torch.tensor([[5, 7, 11, 13]]), adapters_on=True)
    during = seen[:4]
    with adapters(model, on=True), KeepFloat64(), torch.no_grad():
        normed = prefix_keys_values(model, residuals, 3, "normed")
        raw = prefix_keys_values(model, residuals, 3, "raw")
    ours = [tensor for pair in normed for tensor in pair]
    torch.testing.assert_close(ours, during, rtol=0, atol=1e-12)
    assert len(raw) == 2
    key = adapter_modules(model)["layers.1.attn.k_proj"]
    whole = key.weight + key.alpha / 4 * key.lora_b.weight @ key.lora_a.weight  # rank 4, no bias
    torch.testing.assert_close(raw[1][0], residuals[1][:3] @ whole.T, rtol=0, atol=1e-12)


def test_subspace_ablation_by_hand():
    # columns (1, 0, 0) and (1, 1, 0) are not orthonormal: their span is the first two axes
    plane, line = double([1, 1], [0, 1], [0, 0]), double([3], [4], [0])
    hidden = double([[1, 2, 3], [5, 0, 2]]).requires_grad_()
    steer = ablate_with({1: plane, 2: line})
    assert steer(0, hidden) is hidden
    same(steer(1, hidden), 0, 0, 3, 0, 0, 2)
    # h . q = 2.2 and 3 along q = (0.6, 0.8, 0)
    same(steer(2, hidden), -0.32, 0.24, 3, 3.2, -2.4, 2)
    only = ablate_with({2: line}, positions=[1])(2, hidden)
    same(only, 1, 2, 3, 3.2, -2.4, 2)
    same(slope(only[0, :, 0].sum(), hidden), 1, 0, 0, 0.64, -0.48, 0)


def test_direction_block_by_hand():
    # at index 1 row 0 moves by (2, -3), (-1, 1), unread, (0, 4), unread; row 1 by (1, 1), padding
    moves = double([2, -3], [-1, 1], [9, 9], [0, 4], [9, 9])
    start = torch.ones(5, 2, dtype=torch.float64)
    leaf = (start + moves).requires_grad_()
    unread, still = torch.full((3, 2), 9.0), torch.ones(3, 2)
    policy = [[[start, leaf], [still, torch.cat([still[:1] + 1, unread[1:]])]], [[start, leaf]]]
    reference = [[[start, start], [still, still]], [[start, start]]]
    batch = policy, reference, ROWS, 1, dot_latents(double([1, 0], [0, 1]))
    for sides, expected in (
        (("up", "up"), 4 + (0 + 1) + 16 + 2),
        (("down", "down"), 9 + 1),
        (("up", "down"), (4 + 9) + 0 + 0 + 1),
        (("both", "both"), 13 + 2 + 16 + 2),
    ):
        same(direction_block(*batch, sides, reduction="sum"), expected)
        same(direction_block(*batch, sides), expected / 4)
    mean = direction_block(*batch, ("both", "both"), over_latents="mean", samples="safe")
    same(mean, 1.0)
    same(slope(direction_block(*batch, ("up", "down")), leaf), 1, -1.5, 0, 0, 0, 0, 0, 0, 0, 0)
    # a direction is used as long as it is: 2 (2 - 3) = -2
    scaled = dot_latents(double([2, 2]))
    same(direction_block(*batch[:4], scaled, ["down"], samples="task", reduction="sum"), 4.0)


def test_surgery_by_hand():
    user, aligned = {"a": double(1, 0), "b": double(-2)}, {"a": double(1, 0), "b": double(1)}
    # together: g_u . g_a = -1, |g_a|^2 = 2, so g_u + g_a / 2, then + 0.1 g_a
    changed = surgery(user, aligned, rho=0.1)
    same(torch.cat([changed["a"], changed["b"]]), 1.6, 0, -1.4)
    # each: a agrees and stays, b loses all of itself
    changed = surgery(user, aligned, rho=0.1, group="each")
    same(torch.cat([changed["a"], changed["b"]]), 1.1, 0, 0.1)
    # no conflict, and nothing to compare with
    same(surgery({"b": double(3)}, {"b": double(1)}, rho=0.5)["b"], 3.5)
    same(surgery({"b": double(3)}, {"b": double(0)}, rho=0.5)["b"], 3)


def test_inoculated_by_hand():
    x, w = double(1, 2).requires_grad_(), double([1, 0], [0, 1], [1, 1]).requires_grad_()
    task = double([1, 1]).requires_grad_(), double([1], [0], [2]).requires_grad_()
    trait = double([2, 0]).requires_grad_(), double([0], [1], [1]).requires_grad_()
    # W x = (1, 2, 3); B A x = 3 (1, 0, 2); B_IA A_IA x = 2 (0, 1, 1)
    y = inoculated(x, w, task, 2.0, trait, 0.5)
    same(y, 7, 3, 16)
    same(inoculated(x, w, task, 2.0, trait, 0.0), 7, 2, 15)
    leaves = [x, *task, w, *trait]
    to_x, to_a, to_b, *to_frozen = torch.autograd.grad(y[2], leaves, materialize_grads=True)
    # row 2 of W + 2 B A + 0.5 B_IA A_IA = (1, 1) + 4 (1, 1) + (1, 0)
    same(to_x, 6, 5)
    same(to_a, 4, 8)
    same(to_b, 0, 0, 6)
    assert not any(gradient.any() for gradient in to_frozen)


def test_adapter_ema_by_hand():
    history = [{"a": double(value)} for value in (1, 2, 4)]
    for options, expected in (
        ({}, 1.9375),  # 1, 1.25, 1.9375
        ({"start": "zero"}, 1.515625),  # 0.25, 0.6875, 1.515625
        ({"start": "zero", "debias": True}, 97 / 37),  # 1.515625 / (1 - 27 / 64)
    ):
        same(adapter_ema(history, 0.75, **options)["a"], expected)
