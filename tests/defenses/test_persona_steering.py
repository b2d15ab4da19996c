"""PersonaSteering over layers, positions and steps against a slow form in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from reference import forward_row, labelled_positions, to_float64
from reference_defenses import adapter_gradients
from safetensors.torch import save_file
from torchtune.modules.peft import get_adapter_params
from toy_loss import as_batches, assert_same, prepared
from toy_models import toy_microbatches, toy_model

from emarecipes.defenses import ModelSource, PersonaSteering
from emarecipes.errors import UserError
from emarecipes.training.step import TrainingLoss

WIDTH = 32


@pytest.fixture
def vectors(tmp_path: Path) -> torch.Tensor:
    persona = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(3))
    save_file({"persona": persona, "random": -persona}, tmp_path / "v.safetensors")
    return persona.double()


def slow(micro: list[dict[str, Any]], change: Any) -> tuple[dict[str, float], Any, float]:
    """Cross entropy of `h + change(layer, h)` at labelled positions alone, and the logged ratio."""
    model = to_float64(toy_model("llama3"))
    total, count = torch.zeros((), dtype=torch.float64), 0
    seen: dict[int, list[tuple[float, float]]] = {}
    for m in micro:
        seen.clear()  # The ratio is of the last micro-batch.
        for b, length in enumerate(m["lengths"]):
            chosen = labelled_positions(m, b)

            def steer(i: int, h: torch.Tensor, chosen: Any = chosen) -> torch.Tensor:
                new = h.clone()
                for s in chosen:
                    added = change(i, h[0, s])
                    new[0, s] = h[0, s] + added
                    if s and i:
                        sizes = tuple(float(x.detach().square().sum()) for x in (added, h[0, s]))
                        seen.setdefault(i, []).append(sizes)
                return new

            logits, _ = forward_row(model, m["tokens"][b : b + 1, :length], True, steer)
            for s in chosen:
                total = total - logits[s].log_softmax(dim=-1)[int(m["labels"][b, s + 1])]
                count += 1
    ratios = [sum(a for a, _ in x) ** 0.5 / sum(h for _, h in x) ** 0.5 for x in seen.values()]
    ratio = sum(ratios) / len(ratios)
    ce = total / count
    return {"ce": float(ce.detach())}, adapter_gradients(model, ce), ratio


@pytest.mark.parametrize("mode", ["add", "ablate"])
def test_layers_response_and_schedule_are_the_formula(
    vectors: torch.Tensor, tmp_path: Path, mode: Any
) -> None:
    """Step 4 of a decay over 8: alpha is 5/8 of what the config says."""
    micro = toy_microbatches()
    unit = vectors / vectors.norm(dim=1, keepdim=True)

    def change(layer: int, h: torch.Tensor) -> torch.Tensor:
        if layer == 0:
            return torch.zeros_like(h)
        if mode == "add":
            return 0.7 * 5 / 8 * vectors[layer]
        return -(h @ unit[layer]) * unit[layer]

    values, gradients, ratio = slow(micro, change)
    model = toy_model("llama3")
    decay: dict[str, Any] = {"schedule": "linear", "decay_steps": 8} if mode == "add" else {}
    persona = PersonaSteering(
        str(tmp_path / "v.safetensors"),
        layers=[2, 1], alpha=0.7, mode=mode, positions="response", **decay,
    )  # fmt: skip
    loss = TrainingLoss(model, prepared(model, {"persona": persona}))
    persona.begin_step(4)
    batches = as_batches(micro)
    counts = loss.counts(batches)
    figures = loss.means(sum(loss.backward(batch, counts) for batch in batches), counts)
    found = {n: p.grad for n, p in get_adapter_params(model).items() if p.grad is not None}
    assert_same((figures, found), (values, gradients))
    logged = {"ratio": ratio} | ({"alpha": 0.4375} if mode == "add" else {})
    assert persona.figures() == pytest.approx(logged, rel=2e-5)


def test_the_schedule_by_hand(vectors: torch.Tensor, tmp_path: Path) -> None:
    """By default over the run's steps, 9 here; any step by its number alone, in any order."""
    path = str(tmp_path / "v.safetensors")
    expected = {1: 3.0, 4: 2.0, 9: 3.0 / 9, 10: 0.0, 30: 0.0}
    persona = PersonaSteering(path, layer=1, alpha=3.0, schedule="linear")
    prepared(toy_model("llama3"), {"persona": persona})
    for step in (9, 1, 30, 10, 4):
        persona.begin_step(step)
        assert persona.figures()["alpha"] == pytest.approx(expected[step])
    assert persona.state_dict() == {}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "say layer, or layers"),
    ({"layer": 1, "layers": [2]}, "and not both"),
    ({"layers": []}, "at least one layer"),
    ({"layers": [1, 1]}, "each once"),
    ({"layers": [1, 3]}, "layers must be from 1 to 2, the model's layers, not 3"),
    ({"layer": 1, "positions": "prompt"}, "positions must be all or response"),
    ({"layer": 1, "schedule": "cosine"}, "schedule must be constant or linear"),
    ({"layer": 1, "schedule": "linear", "mode": "ablate"}, "which mode: ablate does not use"),
    ({"layer": 1, "decay_steps": 5}, "is for schedule: linear"),
    ({"layer": 1, "schedule": "linear", "decay_steps": 0}, "decay_steps must be >= 1"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_does_not_fit_is_refused(
    vectors: torch.Tensor, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        defense = PersonaSteering(str(tmp_path / "v.safetensors"), **options)
        defense.check(ModelSource(toy_model("llama3"), Path(), "LLAMA3"))
