"""A step's loss at toy size, to compare with a reference: figures and gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torchtune.data import padded_collate_sft
from torchtune.modules.peft import get_adapter_params

from emarecipes.defenses import Defense, ModelSource, TrainingContext
from emarecipes.models.batch import Batch, make_batch
from emarecipes.training.step import TrainingLoss


def as_batches(microbatches: list[dict[str, Any]]) -> list[Batch]:
    """Rows of `toy_microbatches` through our own collate."""
    return [
        make_batch(
            [
                {
                    "tokens": micro["tokens"][b, :length].tolist(),
                    "labels": micro["labels"][b, :length].tolist(),
                    "source": micro["sources"][b],
                }
                for b, length in enumerate(micro["lengths"])
            ],
            range(len(micro["lengths"])),
            padded_collate_sft,
            0,
        )
        for micro in microbatches
    ]


def prepared(
    model: Any, defenses: dict[str, Defense], source: ModelSource | None = None
) -> dict[str, Defense]:
    """The same defenses, checked and set up as a run does."""
    source = source or ModelSource(model, Path(), "LLAMA3")
    context = TrainingContext(torch.device("cpu"), torch.float32, 9, Path(), source, True)
    for defense in defenses.values():
        defense.check(source)
        defense.setup(model, context)
    return defenses


def run(
    model: Any,
    defenses: dict[str, Defense],
    microbatches: list[dict[str, Any]],
    safe_ce_weight: float | None = None,
    compiled: bool = False,
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """A step's figures and the adapter's gradients."""
    loss = TrainingLoss(
        model, prepared(model, defenses), safe_ce_weight, chunk_elements=61 * 3, compiled=compiled
    )
    batches = as_batches(microbatches)
    counts = loss.counts(batches)
    sums = sum(loss.backward(batch, counts) for batch in batches) + loss.backward_weights()
    grads = {n: p.grad for n, p in get_adapter_params(model).items() if p.grad is not None}
    return loss.means(sums, counts), grads


def assert_same(
    found: tuple[dict[str, float], dict[str, torch.Tensor]],
    expected: tuple[dict[str, float], dict[str, torch.Tensor]],
) -> None:
    """Figures and gradients are the reference's, to float32's precision."""
    for name, value in expected[0].items():
        assert found[0][name] == pytest.approx(value, rel=3e-5, abs=1e-6), name
    for name, gradient in expected[1].items():
        scale = max(gradient.abs().max().item(), 1e-4)
        actual = found[1].get(name, torch.zeros_like(gradient, dtype=torch.float32))
        torch.testing.assert_close(
            actual.double(), gradient, rtol=2e-3, atol=5e-5 * scale + 1e-8, msg=name
        )
