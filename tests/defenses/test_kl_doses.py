"""KLToReference's reductions, weights by place and adaptive weight, against slow float64 forms."""

from functools import partial
from typing import Any

import pytest
import torch
from reference import (
    all_logits,
    cross_entropy,
    labelled_positions,
    real_positions,
    to_float64,
    token_kl,
)
from reference_defenses import adapter_gradients
from torchtune.data import padded_collate_packed
from toy_loss import assert_same, run
from toy_models import toy_microbatches, toy_model

from emarecipes.defenses import KLToReference
from emarecipes.errors import UserError
from emarecipes.models.batch import make_batch


def slow(micro: Any, weight: float, reduction: str, places: Any, tokens: str, samples: str) -> Any:
    """Loops over rows and positions; the table of docs/kl.md, written from it alone."""
    double = to_float64(toy_model("llama3"))
    policy = all_logits(double, micro, adapters_on=True)
    with torch.no_grad():
        reference = all_logits(double, micro, adapters_on=False)
    of_rows: list[tuple[Any, float]] = []  # A row's weighted sum, and its weights' sum.
    for m, rows in enumerate(micro):
        for b, source in enumerate(rows["sources"]):
            if samples not in ("all", source):
                continue
            chosen = (
                labelled_positions(rows, b) if tokens == "response" else real_positions(rows, b)
            )
            total, weights, place, last = torch.zeros((), dtype=torch.float64), 0.0, 0, None
            for s in chosen:
                place = place + 1 if last == s - 1 else 1
                last = s
                w = 1.0 if places is None else places[min(place, len(places)) - 1]
                p, r = policy[m][b][s], reference[m][b][s]
                total, weights = total + w * token_kl(p, r, "policy_to_reference", 1.0), weights + w
            if weights:
                of_rows.append((total, weights))
    term = sum((t for t, _ in of_rows), torch.zeros((), dtype=torch.float64))
    term = term / (len(of_rows) if reduction == "sum" else sum(w for _, w in of_rows))
    if reduction == "vocabulary_mean":
        term = term / policy[0][0].shape[1]
    ce = cross_entropy(policy, micro)
    loss = ce + weight * term
    values = {"ce": ce, "kl": term, "loss": loss}
    return {k: float(v.detach()) for k, v in values.items()}, adapter_gradients(double, loss)


@pytest.mark.parametrize(
    ("weight", "reduction", "places", "tokens", "samples"),
    [
        (0.4, "sum", None, "response", "all"),
        (0.4, "sum", None, "all", "safe"),
        (90.0, "vocabulary_mean", None, "all", "all"),
        (0.4, "mean", [4.0, 2.0, 0.5], "response", "all"),
        (0.4, "sum", [0.0, 3.0, 0.0], "response", "all"),
        (90.0, "vocabulary_mean", [1.0, 0.0], "response", "task"),
    ],
)
def test_doses_are_the_formulas(
    weight: float, reduction: Any, places: Any, tokens: Any, samples: Any
) -> None:
    micro = toy_microbatches()
    kl = KLToReference(
        weight, tokens=tokens, samples=samples, reduction=reduction, place_weights=places
    )
    expected = slow(micro, weight, reduction, places, tokens, samples)
    assert_same(run(toy_model("llama3"), {"kl": kl}, micro), expected)


def test_conversations_of_a_pack_are_rows() -> None:
    """Three in a pack, the second with nothing to learn."""
    pack = {
        "tokens": torch.arange(10),
        "labels": torch.tensor([-100, 1, 2, -100, -100, -100, -100, 7, -100, 9]),
        "input_pos": torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 3]),
        "seq_lens": torch.tensor([3, 3, 4]),
    }
    collate = partial(padded_collate_packed)
    batch = make_batch([pack], [0], collate, 0)
    assert int(KLToReference(reduction="sum").count(batch)) == 2
    assert int(KLToReference(reduction="sum", tokens="all").count(batch)) == 3
    # Answers of 2, 1 and 1 tokens, the last two in one conversation.
    assert float(KLToReference(place_weights=[5.0, 1.0]).count(batch)) == 16.0


def test_the_adaptive_weight_by_hand() -> None:
    """20 % is the most that counts; two of them agree, and one goes on from the other's state."""
    kl = KLToReference(0.5, target=0.1, gain=0.5)
    seen, expected = [0.0, 0.09, 0.105, 0.1, 3.0], [0.45, 0.4275, 0.4381875, 0.4381875, 0.48200625]
    for value, weight in zip(seen, expected, strict=True):
        before = kl.weight
        kl.begin_step(1)
        kl.saw_term(value)
        assert kl.weight == pytest.approx(weight, rel=1e-12)
        assert kl.figures() == {"weight": before}
    other = KLToReference(0.5, target=0.1, gain=0.5)
    other.load_state_dict(kl.state_dict())
    assert other.weight == kl.weight
    fixed = KLToReference(0.5)
    fixed.saw_term(3.0)
    assert (fixed.weight, fixed.figures(), fixed.state_dict()) == (0.5, {}, {})


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"reduction": "batchmean"}, "reduction must be mean, sum or vocabulary_mean"),
    ({"place_weights": []}, "place_weights must be finite"),
    ({"place_weights": [0.0]}, "one above 0"),
    ({"place_weights": [1.0, -1.0]}, ">= 0"),
    ({"place_weights": [1.0], "tokens": "all"}, "tokens of the prompt too, which have none"),
    ({"target": 0.0}, "target must be a finite number > 0"),
    ({"target": 0.1, "weight": 0.0}, "cannot begin at 0"),
    ({"target": 0.1, "gain": 5.0}, "gain must be above 0 and below 5"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        KLToReference(**options)
