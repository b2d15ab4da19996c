"""What takes cross entropy's place, against float64 forms written from the formulas alone."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import reference_new_defenses
import torch
from omegaconf import OmegaConf
from reference import all_logits, cross_entropy, to_float64
from reference_defenses import adapter_gradients
from toy_loss import as_batches, assert_same, prepared, run
from toy_models import toy_microbatches, toy_model

from emarecipes.config import Origin
from emarecipes.defenses import AnchoredSFT, Defense, KLToReference, TokenConstraint
from emarecipes.errors import UserError
from emarecipes.models.batch import Batch
from emarecipes.training.component_checks import build_defenses
from emarecipes.training.gradients import Gradients
from emarecipes.training.step import TrainingLoss

Step = tuple[dict[str, float], dict[str, torch.Tensor]]


class Fading(Defense):
    """A user's own: cross entropy whose tokens weigh less the further they are in the answer."""

    def token_weights(self, batch: Batch) -> torch.Tensor:
        return 1.0 / (1.0 + batch.places_BS)


class Pulled(Fading):
    """The same around a loss of its own, -log p + p."""

    needs_targets = True

    def logit_term(self, policy, reference, targets_T=None, places_T=None):  # type: ignore
        log_p_T = policy.gather(1, targets_T[:, None])[:, 0]
        return log_p_T.exp() - log_p_T


def slow(family: str, micro: Any, form: Any, weight: float, safe: float | None) -> Step:
    """The step of `form`, which gives a sum over one source's tokens, and what to divide it by."""
    double = to_float64(toy_model(family))
    policy = all_logits(double, micro, adapters_on=True)
    with torch.no_grad():
        reference = all_logits(double, micro, adapters_on=False)
    sums = [form(policy, reference, micro, samples=s, reduction="sum") for s in ("task", "safe")]
    counts = [
        float(reference_new_defenses.over_targets(
            partial(form.keywords.get("weigh", one)), policy, reference, micro,
            samples=s, reduction="sum", restart=True,
        ))
        for s in ("task", "safe")
    ]  # fmt: skip
    w = 1.0 if safe is None else safe
    term = (sums[0] + w * sums[1]) / (counts[0] + w * counts[1])
    loss = weight * term
    values = {"term": float(term.detach()), "loss": float(loss.detach())}
    if safe is None:
        values["ce"] = float(cross_entropy(policy, micro).detach())
    return values, adapter_gradients(double, loss)


def one(log_p: torch.Tensor, log_r: torch.Tensor, target: int, t: int) -> torch.Tensor:
    return torch.ones((), dtype=torch.float64)


def fading(log_p: torch.Tensor, log_r: torch.Tensor, target: int, t: int) -> torch.Tensor:
    return torch.tensor(1.0 / (1.0 + t), dtype=torch.float64)


def weighed(*batch: Any, weigh: Any, pulled: bool, **how: Any) -> torch.Tensor:
    def term(log_p: torch.Tensor, log_r: torch.Tensor, target: int, t: int) -> torch.Tensor:
        value = -log_p[target] + (log_p[target].exp() if pulled else 0.0)
        return weigh(log_p, log_r, target, t) * value

    return reference_new_defenses.over_targets(term, *batch, restart=True, **how)


CONSTRAINT = partial(reference_new_defenses.token_constraint, restart=True)
FORMS: dict[str, tuple[Any, Any]] = {
    "constraint": (TokenConstraint, CONSTRAINT),
    "anchored": (
        partial(AnchoredSFT, anchor=0.3),
        partial(reference_new_defenses.anchored_sft, weight=0.3),
    ),
    "dft": (
        partial(AnchoredSFT, anchor=0.0),
        partial(reference_new_defenses.anchored_sft, weight=0.0),
    ),
    "fading": (Fading, partial(weighed, weigh=fading, pulled=False)),
    "pulled": (Pulled, partial(weighed, weigh=fading, pulled=True)),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(
    ("family", "safe"), [("llama3", None), ("gemma2", None), ("llama3", 0.4), ("llama3", 0.0)]
)
def test_the_loss_and_its_gradient(name: str, family: str, safe: float | None) -> None:
    """Over two micro-batches and chunks of three tokens; answers with a gap; sources weighed."""
    ours, form = FORMS[name]
    micro = toy_microbatches()
    found = run(toy_model(family), {"term": ours(weight=0.7)}, micro, safe_ce_weight=safe)
    assert_same(found, slow(family, micro, form, 0.7, safe))


def test_beside_other_terms_and_only_measured() -> None:
    micro = toy_microbatches()
    kl = KLToReference(weight=0.5, tokens="all")
    both = run(toy_model("llama3"), {"kl": kl, "term": TokenConstraint()}, micro)
    kl_alone = run(toy_model("llama3"), {"kl": kl}, micro)
    term_alone = run(toy_model("llama3"), {"term": TokenConstraint()}, micro)
    plain = run(toy_model("llama3"), {}, micro)
    assert both[0]["loss"] == pytest.approx(term_alone[0]["term"] + 0.5 * kl_alone[0]["kl"])
    # Not bit for bit: KL on all positions makes the output layer's products larger.
    assert both[0]["ce"] == pytest.approx(plain[0]["ce"], rel=1e-7)
    for key, gradient in both[1].items():
        total = term_alone[1][key] + kl_alone[1][key] - plain[1][key]
        torch.testing.assert_close(gradient, total, rtol=1e-3, atol=1e-6)
    measured = run(toy_model("llama3"), {"term": TokenConstraint(weight=0.0)}, micro)
    assert measured[0] == {**plain[0], "term": term_alone[0]["term"]}
    assert all(torch.equal(measured[1][key], gradient) for key, gradient in plain[1].items())


def test_others_are_compared_with_what_is_learned() -> None:
    model = toy_model("llama3")
    defenses = {"kl": KLToReference(), "term": AnchoredSFT()}
    loss = TrainingLoss(model, prepared(model, defenses))
    batches = as_batches(toy_microbatches())
    counts = loss.counts(batches)
    gradients = Gradients(model, loss, 1, torch.device("cpu"))
    found = gradients.ratios(10, batches, counts, defenses, {})
    assert list(found) == ["kl_gradient_ratio"]
    expected = [gradients.norm_of([n], batches, counts) for n in ("kl", "term")]
    assert found["kl_gradient_ratio"] == pytest.approx(expected[0] / expected[1])


def test_a_term_without_a_row_in_the_step_is_not_compared(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And nothing is told of it, though its gradient would be 0."""
    model = toy_model("llama3")
    kl = KLToReference(samples="safe")
    kl.gradient_ratio_every = 10
    loss = TrainingLoss(model, prepared(model, {"kl": kl}))
    micro = [m | {"sources": ["task"] * len(m["lengths"])} for m in toy_microbatches()]
    batches = as_batches(micro)
    gradients = Gradients(model, loss, 1, torch.device("cpu"))
    assert gradients.ratios(10, batches, loss.counts(batches), {"kl": kl}, {}) == {}
    assert "gradient" not in caplog.text


def test_places_begin_anew_in_each_answer_of_a_pack() -> None:
    ignored = -100
    labels = torch.tensor([[ignored, ignored, 5, 6, ignored, 7, ignored, ignored, 8, 9, 4]])
    conversation = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1]])
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=ignored)
    batch = Batch({"tokens": torch.arange(11)[None]}, targets, conversation, ["task"], [0])
    assert batch.places_BS.tolist() == [[0, 1, 2, 0, 1, 0, 0, 1, 2, 3, 0]]
    assert batch.next_BS.tolist() == [[1, 5, 6, 4, 7, 6, 7, 8, 9, 4, 0]]


class Elsewhere(Defense):
    replaces_cross_entropy = True

    def __init__(self) -> None:
        super().__init__(tokens="all", every_n_batches=2)

    def logit_term(self, policy_logits_TV, reference_logits_TV):  # type: ignore
        return policy_logits_TV[:, 0]


class Nothing(Defense):
    replaces_cross_entropy = True


OURS = "emarecipes.defenses."
HERE = f"{__name__}."


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ([OURS + "TokenConstraint", OURS + "AnchoredSFT"], "b: a and b both take cross entropy's"),
        ([HERE + "Elsewhere"], "cannot have tokens and every_n_batches"),
        ([HERE + "Nothing"], "has no logit_term"),
    ],
)
def test_what_cannot_take_its_place(entries: list[str], match: str, tmp_path: Any) -> None:
    named = {key: {"_component_": entry} for key, entry in zip("ab", entries, strict=False)}
    cfg = OmegaConf.create({"defenses": named})
    source: Any = SimpleNamespace(meta_model=toy_model("llama3"))
    with pytest.raises(UserError, match=match):
        build_defenses(cfg, Origin(tmp_path / "c.yaml", {}, set()), source)


@pytest.mark.parametrize("weights", [torch.ones(2, 3), -torch.ones(2, 13), None])
def test_token_weights_that_are_none(weights: Any) -> None:
    class Wrong(Defense):
        def token_weights(self, batch: Batch) -> Any:
            return weights

    with pytest.raises(UserError, match="token_weights must "):
        run(toy_model("llama3"), {"x": Wrong()}, toy_microbatches(n_micro=1))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: TokenConstraint(betas=[]), "betas must be finite numbers > 0"),
        (lambda: TokenConstraint(betas=[1.0, 0.0]), "betas must be finite numbers > 0"),
        (lambda: TokenConstraint(weight=-1.0), "weight must be a finite number"),
        (lambda: AnchoredSFT(anchor=-0.1), "anchor must be a finite number >= 0"),
    ],
)
def test_wrong_arguments(make: Any, match: str) -> None:
    with pytest.raises(UserError, match=match):
        make()
