"""Gradient surgery against float64 gradients, each of its own backward."""

from types import SimpleNamespace
from typing import Any

import pytest
import reference_new_defenses
import torch
from omegaconf import OmegaConf
from reference import all_logits, cross_entropy, kl_to_reference, to_float64
from reference_defenses import adapter_gradients
from torchtune.modules.peft import get_adapter_params
from toy_loss import as_batches, assert_same, prepared
from toy_models import toy_microbatches, toy_model

from emarecipes.config import Origin
from emarecipes.defenses import Defense, GradientSurgery, KLToReference
from emarecipes.errors import UserError
from emarecipes.training.component_checks import build_defenses
from emarecipes.training.gradients import Gradients
from emarecipes.training.step import TrainingLoss

KL = {"direction": "policy_to_reference", "tokens": "response", "temperature": 1.0}


class Away(KLToReference):
    """A term that conflicts: less of it is more KL."""

    def logit_term(self, policy_logits_TV, reference_logits_TV):  # type: ignore
        return -super().logit_term(policy_logits_TV, reference_logits_TV)


def step_of(
    model: Any, defenses: dict[str, Defense], micro: Any, safe_ce_weight: float | None = None
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Figures and gradient, as a run has them when it clips."""
    loss = TrainingLoss(model, prepared(model, defenses), safe_ce_weight, chunk_elements=61 * 3)
    batches = as_batches(micro)
    counts = loss.counts(batches)
    gradients = Gradients(model, loss, 1, torch.device("cpu"))
    sums, once = gradients.backward(batches, counts, defenses)
    gradients.before_update(1, defenses)
    figures = loss.means(torch.stack([*sums, once]).sum(dim=0), counts)
    for name, defense in defenses.items():
        figures |= {f"{name}_{key}": value for key, value in defense.figures().items()}
    return figures, {n: p.grad for n, p in get_adapter_params(model).items() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama3", "gemma2"])
@pytest.mark.parametrize(("other", "projected"), [(Away, 1.0), (KLToReference, 0.0)])
def test_the_gradient_is_that_of_the_formula(family: str, other: Any, projected: float) -> None:
    """With a term that opposes the KL and with one that does not; the other term is in g_u."""
    micro = toy_microbatches(n_micro=3)
    double = to_float64(toy_model(family))
    policy = all_logits(double, micro, adapters_on=True)
    with torch.no_grad():
        reference = all_logits(double, micro, adapters_on=False)
    safe, task = (
        kl_to_reference(policy, reference, micro, samples=s, **KL)  # type: ignore[arg-type]
        for s in ("safe", "task")
    )
    ce = cross_entropy(policy, micro)
    theirs = (-task if other is Away else task) * 40
    leaves = list(get_adapter_params(double).values())
    user = [torch.autograd.grad(t, leaves, retain_graph=True) for t in (ce, theirs)]
    names = list(get_adapter_params(double))
    g_u = dict(zip(names, (one + two for one, two in zip(*user, strict=True)), strict=True))
    g_a = adapter_gradients(double, safe)
    dot, uu, aa = (
        sum(float((x[n] * y[n]).sum()) for n in names)
        for x, y in ((g_u, g_a), (g_u, g_u), (g_a, g_a))
    )
    assert (dot < 0) == bool(projected)
    expected = {
        "ce": ce.item(),
        "surgery": safe.item(),
        "loss": (ce + theirs + 0.3 * safe).item(),
        "surgery_projected": projected,
        "surgery_cosine": dot / (uu * aa) ** 0.5,
        "surgery_user_norm": uu**0.5,
        "surgery_safe_norm": aa**0.5,
    }
    defenses = {"surgery": GradientSurgery(weight=0.3), "x": other(weight=40.0, samples="task")}
    found = step_of(toy_model(family), defenses, micro)
    assert_same(found, (expected, reference_new_defenses.surgery(g_u, g_a, 0.3)))


def test_accumulation_counts_the_whole_step() -> None:
    """Rows of one batch and the same in two, of which one has no safe row."""
    (whole,) = toy_microbatches(n_micro=1, batch=4)
    whole["sources"] = ["task", "task", "safe", "task"]
    keys = ("tokens", "labels", "lengths", "sources")
    split = [{key: whole[key][half] for key in keys} for half in (slice(0, 2), slice(2, 4))]
    one, two = (
        step_of(toy_model("llama3"), {"s": GradientSurgery(), "x": Away(9.0)}, micro)
        for micro in ([whole], split)
    )
    assert one[0]["s_projected"] == 1.0
    assert_same(two, (one[0], {name: grad.double() for name, grad in one[1].items()}))


def test_without_conflict_or_weight_it_is_kl_or_nothing() -> None:
    """No projection: `KLToReference` on the same rows. Weight 0: cross entropy, bit for bit."""
    micro = toy_microbatches()
    near = {"x": KLToReference(40.0, samples="task")}
    found = step_of(toy_model("llama3"), {"k": GradientSurgery(0.5), **near}, micro)
    control = step_of(toy_model("llama3"), {"k": KLToReference(0.5, samples="safe"), **near}, micro)
    assert found[0].pop("k_projected") == 0.0
    assert {key: found[0][key] for key in control[0]} == pytest.approx(control[0])
    for name, gradient in control[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)
    measured = step_of(toy_model("llama3"), {"k": GradientSurgery(0.0)}, micro)
    plain = step_of(toy_model("llama3"), {}, micro)
    assert set(measured[0]) - set(plain[0]) == {"k"} and measured[0]["k"] > 0
    assert all(torch.equal(measured[1][name], gradient) for name, gradient in plain[1].items())


class Reader(Defense):
    """A user's own, without a term: keeps what it is given."""

    apart = ("ce", "kl")

    def before_update(self, model: Any, step: int, apart: Any) -> None:
        self.found = {key: {p: g for p, g in pairs} for key, pairs in apart.items()}


def test_a_users_class_reads_the_parts_of_the_gradient() -> None:
    """Which is left as the run without it has it, and is their sum."""
    micro, kl = toy_microbatches(), KLToReference(2.0)
    reader = Reader()
    model = toy_model("llama3")
    found = step_of(model, {"kl": kl, "r": reader}, micro, safe_ce_weight=0.5)
    plain = step_of(toy_model("llama3"), {"kl": kl}, micro, safe_ce_weight=0.5)
    assert found[0] == pytest.approx(plain[0])
    for name, parameter in get_adapter_params(model).items():
        both = reader.found["ce"][parameter] + reader.found["kl"][parameter]
        torch.testing.assert_close(both, plain[1][name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found[1][name], both, rtol=1e-4, atol=1e-6)


class Idle(Defense):
    apart = ("ce",)


class OfBefore(Defense):
    def policy_forward(self) -> Any:
        return None


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"_component_": f"{__name__}.Reader"}, "no gradient of kl can be had apart"),
        ({"_component_": f"{__name__}.Idle"}, "Idle has apart, and no before_update"),
        (
            {"_component_": f"{__name__}.OfBefore"},
            r"OfBefore.policy_forward is called with \(batch\): too many positional arguments",
        ),
        ({"_component_": "emarecipes.defenses.GradientSurgery", "samples": "x"}, "samples must be"),
    ],
)
def test_what_is_refused(entry: Any, match: str, tmp_path: Any) -> None:
    cfg = OmegaConf.create({"defenses": {"r": entry}})
    source: Any = SimpleNamespace(meta_model=toy_model("llama3"))
    with pytest.raises(UserError, match=match):
        build_defenses(cfg, Origin(tmp_path / "c.yaml", {}, set()), source)
