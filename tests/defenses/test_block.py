"""DirectionBlock against the float64 reference that was written from the formula alone."""

from pathlib import Path
from typing import Any

import pytest
import reference_new_defenses
import torch
from reference import cross_entropy, to_float64
from reference_defenses import adapter_gradients, forward_all
from safetensors.torch import save_file
from toy_loss import as_batches, assert_same, prepared, run
from toy_models import FAMILIES, toy_microbatches, toy_model

from emarecipes.defenses import Defense, DirectionBlock, KLToReference, ModelSource
from emarecipes.errors import UserError
from emarecipes.training.step import TrainingLoss

WIDTH, DEPTH = 32, 2


def write(folder: Path, **tensors: torch.Tensor) -> str:
    save_file(tensors, folder / "v.safetensors", metadata={"model": "."})
    return str(folder / "v.safetensors")


def directions(count: int | None = None) -> torch.Tensor:
    shape = (DEPTH + 1, WIDTH) if count is None else (DEPTH + 1, count, WIDTH)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


def expected(
    family: str, micro: Any, unit_KD: torch.Tensor, layer: int, side: str, samples: str
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    double = to_float64(toy_model(family))
    logits, policy = forward_all(double, micro, True)
    with torch.no_grad():
        _, reference = forward_all(double, micro, False)
    latents = reference_new_defenses.dot_latents(unit_KD)
    sides = [side] * len(unit_KD)
    term = reference_new_defenses.direction_block(
        policy, reference, micro, layer, latents, sides, samples=samples
    )
    ce = cross_entropy(logits, micro)
    loss = ce + 0.6 * term
    values = {"ce": float(ce.detach()), "block": float(term.detach())}
    return values | {"loss": float(loss.detach())}, adapter_gradients(double, loss)


@pytest.mark.parametrize("side", ["up", "down", "both"])
@pytest.mark.parametrize(
    ("family", "layer", "count", "samples"),
    [(family, 1, None, "all") for family in FAMILIES] + [("llama3", 2, 3, "safe")],
)
def test_the_term_and_its_gradient(
    side: Any, family: str, layer: int, count: int | None, samples: Any, tmp_path: Path
) -> None:
    micro = toy_microbatches()
    given = directions(count)
    rows_KD = given[layer].reshape(-1, WIDTH).double()
    unit_KD = rows_KD / rows_KD.norm(dim=1, keepdim=True)
    defense = DirectionBlock(
        write(tmp_path, persona=given), layer, side=side, weight=0.6, samples=samples
    )
    found = run(toy_model(family), {"block": defense}, micro)
    assert_same(found, expected(family, micro, unit_KD, layer, side, samples))
    assert found[0]["block"] > 0


def test_a_side_sees_what_the_other_does_not(tmp_path: Path) -> None:
    """At each token and direction the change is a rise or a fall: the two terms are the third."""
    micro = toy_microbatches()
    path = write(tmp_path, subspace=directions(3))
    up, down, both = (
        run(
            toy_model("llama3"),
            {"block": DirectionBlock(path, 1, tensor="subspace", side=side)},  # type: ignore[arg-type]
            micro,
        )[0]["block"]
        for side in ("up", "down", "both")
    )
    assert up + down == pytest.approx(both, rel=1e-5)


def test_the_rise_is_that_of_the_hidden_states(tmp_path: Path) -> None:
    (micro,) = toy_microbatches(n_micro=1)
    given = directions()
    defense = DirectionBlock(write(tmp_path, persona=given), 2, weight=0.0)
    model = toy_model("llama3")
    loss = TrainingLoss(model, prepared(model, {"block": defense}))
    (batch,) = as_batches([micro])
    loss.backward(batch, loss.counts([batch]))
    double = to_float64(toy_model("llama3"))
    with torch.no_grad():
        _, policy = forward_all(double, [micro], True)
        _, reference = forward_all(double, [micro], False)
    unit_D = given[2].double() / given[2].double().norm()
    rises = [
        float((policy[0][b][2][s] - reference[0][b][2][s]) @ unit_D)
        for b, length in enumerate(micro["lengths"])
        for s in range(length - 1)
        if micro["labels"][b, s + 1] != -100
    ]
    assert defense.figures()["rise"] == pytest.approx(sum(rises) / len(rises), rel=1e-4)


@pytest.mark.parametrize("layer", [1, 2])
def test_the_reference_ends_at_the_layer_that_is_read(layer: int, tmp_path: Path) -> None:
    """Unless a term on logits reads it; the numbers are the same, bit for bit."""
    (micro,), path = toy_microbatches(n_micro=1), write(tmp_path, persona=directions())
    found, calls = [], []
    others: list[dict[str, Defense]] = [{}, {"kl": KLToReference(weight=0.0)}]
    for more in others:
        model, seen = toy_model("llama3"), list[int]()
        model.layers[1].register_forward_hook(lambda *_, seen=seen: seen.append(1))
        found.append(run(model, {"block": DirectionBlock(path, layer, weight=0.6)} | more, [micro]))
        calls.append(len(seen))
        assert len(model.layers) == DEPTH
    assert calls == [layer, 2]
    assert all(found[1][0][name] == value for name, value in found[0][0].items())
    assert all(torch.equal(found[1][1][name], value) for name, value in found[0][1].items())


@pytest.mark.parametrize(
    ("options", "tensors", "match"),
    [
        ({"side": "left"}, {}, "side must be up, down or both, not left"),
        ({"layer": 3}, {}, "layer must be from 1 to 2, the model's layers, not 3"),
        ({"tensor": "other"}, {}, "has no tensor other"),
        ({}, {"persona": torch.ones(3, 8)}, "holds 3x8 numbers, the model needs 3 x 32"),
        ({}, {"persona": torch.ones(2, 32)}, "holds 2x32 numbers"),
        ({}, {"persona": torch.zeros(3, 32)}, "row 1 is zero or not finite"),
        ({}, {"persona": torch.full((3, 2, 32), float("nan"))}, "row 1 is zero or not finite"),
        ({"weight": -1.0}, {}, "weight must be a finite number >= 0"),
    ],
)
def test_what_does_not_fit(
    options: dict[str, Any], tensors: dict[str, torch.Tensor], match: str, tmp_path: Path
) -> None:
    path = write(tmp_path, **(tensors or {"persona": directions()}))
    source = ModelSource(toy_model("llama3"), Path(), "LLAMA3")
    with pytest.raises(UserError, match=match):
        DirectionBlock(**({"directions": path, "layer": 1} | options)).check(source)
