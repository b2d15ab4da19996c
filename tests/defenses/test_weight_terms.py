"""Terms on the adapter's matrices, against dense float64 and autograd."""

import math
from typing import Any

import pytest
import reference_new_defenses
import torch
from torch import Tensor
from torchtune.modules.peft import get_adapter_params
from toy_loss import as_batches, prepared
from toy_models import toy_microbatches, toy_model

from emarecipes.defenses import AdaptedModule, Defense, SpectralPenalty, spectral
from emarecipes.errors import UserCodeError
from emarecipes.training.gradients import Gradients
from emarecipes.training.step import TrainingLoss


def pairs(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Every layer's A and B, float64 copies that take a gradient."""
    parameters = get_adapter_params(model)
    return {
        name.removesuffix(".lora_a.weight"): (
            a.detach().double().requires_grad_(),
            parameters[name.replace("lora_a", "lora_b")].detach().double().requires_grad_(),
        )
        for name, a in parameters.items()
        if "lora_a" in name
    }


def assert_gradients(model: Any, expected: dict[str, tuple[Tensor, Tensor]], factor: float) -> None:
    parameters = get_adapter_params(model)
    for name, matrices in expected.items():
        for letter, matrix in zip("ab", matrices, strict=True):
            found = parameters[f"{name}.lora_{letter}.weight"].grad
            wanted = torch.zeros_like(matrix) if matrix.grad is None else matrix.grad
            found = torch.zeros_like(wanted) if found is None else found.double()
            torch.testing.assert_close(
                found, factor * wanted, rtol=1e-4, atol=1e-6 * factor, msg=name
            )


@pytest.mark.parametrize("family", ["llama3", "phi3"])
def test_the_spectral_penalty_is_that_of_dense_updates(family: str) -> None:
    """Value, gradient and figures; one B is 0, one has a column of zeros."""
    model = toy_model(family)
    parameters = get_adapter_params(model)
    first, second, *_ = [p for n, p in parameters.items() if n.endswith("lora_b.weight")]
    first.data.zero_()
    second.data[:, 1] = 0.0
    expected = pairs(model)
    terms, ranks, entropies = [], [], []
    for a, b in expected.values():
        if not b.any():
            continue
        update = b @ a
        values = torch.linalg.svdvals(update)
        values = values[values > 1e-9]  # A zero has no gradient of its own.
        terms.append(values.norm() / values.sum())
        values = values.detach()
        share = values / values.sum()
        ranks.append(float((values**2).sum() / values[0] ** 2))
        entropies.append(float(-(share * share.log()).sum()))
    assert len(terms) == len(expected) - 1
    mean = reference_new_defenses.spectral_penalty(expected)
    assert mean.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-9)
    mean.backward()

    defense = SpectralPenalty(weight=0.3)
    loss = TrainingLoss(model, prepared(model, {"spectral": defense}))
    sums = loss.backward_weights()
    batches = as_batches(toy_microbatches())
    value = loss.means(sums, loss.counts(batches))["spectral"]
    assert value == pytest.approx(mean.item(), rel=1e-5)
    assert_gradients(model, expected, 0.3)
    assert defense.figures() == pytest.approx(
        {"stable_rank": sum(ranks) / len(ranks), "entropy": sum(entropies) / len(entropies)},
        rel=1e-4,
    )
    assert defense.figures() == {}, "of the last step alone"


def test_before_the_first_step_there_is_no_update_to_penalise() -> None:
    model = toy_model("llama3")
    for name, parameter in get_adapter_params(model).items():
        if "lora_b" in name:
            parameter.data.zero_()
    defense = SpectralPenalty()
    loss = TrainingLoss(model, prepared(model, {"spectral": defense}))
    batches = as_batches(toy_microbatches())
    counts = loss.counts(batches)
    sums = loss.backward_weights()
    assert "spectral" not in loss.means(sums, counts)
    assert all(p.grad is None for p in get_adapter_params(model).values())
    assert defense.figures() == {}


class Decay(Defense):
    """Sum over layers of |scale * B A|_F^2; A and B of one layer at a time."""

    module_reduction = "sum"

    def weight_term(self, module: AdaptedModule) -> Tensor:
        return (module.scale * module.b_OR @ module.a_RI).square().sum()


def test_a_users_term_is_a_sum_counted_once_whatever_the_micro_batches() -> None:
    model = toy_model("llama3")
    expected = pairs(model)
    total = sum(((8 / 4) * b @ a).square().sum() for a, b in expected.values())
    total.backward()
    loss = TrainingLoss(model, prepared(model, {"decay": Decay(0.2, every_n_batches=2)}))
    batches = as_batches(toy_microbatches())
    for step in (1, 2):
        loss.begin_step(step)
        if "decay" not in loss.present:
            continue
        counts = loss.counts(batches)
        sums = sum(loss.backward(batch, counts) for batch in batches) + loss.backward_weights()
        with_term = [p.grad.clone() for p in get_adapter_params(model).values()]
        values = loss.means(sums, counts)
        assert values["decay"] == pytest.approx(total.item(), rel=1e-5)
        assert values["loss"] == pytest.approx(values["ce"] + 2 * 0.2 * values["decay"], rel=1e-6)
        model.zero_grad()
        for batch in batches:
            loss.backward(batch, counts, only=["ce"])
        for p, both in zip(get_adapter_params(model).values(), with_term, strict=True):
            p.grad = both - p.grad
        assert_gradients(model, expected, 0.4)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda m: m.a_RI.detach().sum(), "defenses.bad: what weight_term returns carries no grad"),
        (lambda m: m.a_RI.square(), "defenses.bad: weight_term must return a scalar tensor"),
        (lambda m: 1.0, "defenses.bad: weight_term must return a scalar tensor or None, not 1.0"),
    ],
)
def test_a_users_mistake_is_said(value: Any, message: str) -> None:
    class Bad(Defense):
        def weight_term(self, module: AdaptedModule) -> Any:
            return value(module)

    model = toy_model("llama3")
    loss = TrainingLoss(model, {"bad": Bad()})
    with pytest.raises(UserCodeError, match=message):
        loss.backward_weights()


def test_a_term_without_gradient_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """Rank 1: the ratio of the norms is 1 whatever the update. Once, in the first step from 10."""
    batches = as_batches(toy_microbatches())
    for rank, warned in ((1, True), (4, False)):
        model = toy_model("llama3", lora_rank=rank)
        defenses = prepared(model, {"spectral": SpectralPenalty()})
        loss = TrainingLoss(model, defenses)
        gradients = Gradients(model, loss, 1, torch.device("cpu"))
        logged: dict[str, float] = {}
        caplog.clear()
        for step in (9, 10, 11):
            loss.begin_step(step)
            found = gradients.ratios(step, batches, loss.counts(batches), defenses, logged)
            assert bool(found) == (step == 10)
            logged |= found
        assert (logged["spectral_gradient_ratio"] < 1e-6) == warned
        assert ("the gradient of defenses.spectral is 0" in caplog.text) == warned
        assert all(p.grad is None for p in get_adapter_params(model).values())


def test_an_update_that_is_not_finite_makes_the_term_so() -> None:
    model = toy_model("llama3")
    next(iter(get_adapter_params(model).values())).data[0, 0] = math.inf
    loss = TrainingLoss(model, prepared(model, {"spectral": SpectralPenalty()}))
    assert loss.backward_weights().isnan().any()


def test_singular_values_that_are_rounding_have_no_part_in_the_gradient() -> None:
    """A fourth at 5e-7 of the first counts as such."""
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(48, 4, generator=generator))
    p, _ = torch.linalg.qr(torch.randn(32, 4, generator=generator))
    found = []
    for last in (0.0, 5e-7):
        b = (q * torch.tensor([1.0, 0.5, 0.2, last])).requires_grad_()
        a = p.T.clone().requires_grad_()
        value = SpectralPenalty().weight_term(AdaptedModule("x", a, b, 1.0))
        assert value is not None
        found.append((value.detach(), *torch.autograd.grad(value, (a, b))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_small_singular_values_have_their_gradient() -> None:
    """Down to 1e-5 of the first: by QR in float32 such a one was left out as rounding."""
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(300, 8, generator=generator))
    turned, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator))
    b = (q @ torch.diag(torch.logspace(0, -5, 8)) @ turned).requires_grad_()
    a = torch.randn(8, 200, generator=generator).requires_grad_()
    value = SpectralPenalty().weight_term(AdaptedModule("x", a, b, 1.0))
    assert value is not None
    found = torch.autograd.grad(value, (a, b))
    exact = [x.detach().double().requires_grad_() for x in (a, b)]
    expected = reference_new_defenses.spectral_penalty({"x": (exact[0], exact[1])})
    for one, other in zip(found, torch.autograd.grad(expected, exact), strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-6


def test_an_update_of_lower_rank_has_no_logarithm_of_0() -> None:
    a = torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0]))
    b = torch.zeros(5, 4)
    b[0, 0], b[1, 1] = 3.0, 6.0
    found = spectral.evenness(a, b)
    assert found == pytest.approx((2.0, math.log(2)))
