"""The layers with fewer passes against torchtune's own, in float64 and at a real width in float32.

`tests/recipes/test_lora_numbers.py` compares whole fp32 runs, which have them, with torchtune's.
"""

from typing import Any

import pytest
import torch
from torchtune.modules.peft import disable_adapter, get_adapter_params
from toy_models import VOCAB_SIZE, toy_model

from emarecipes.models._torchtune_cpu import with_fewer_passes

# Exchanged in two layers and the final norm: LoRA, norms, rotations (the layers may share one).
EXCHANGED = {
    "llama3": (14, 5, 2),
    "llama3_2": (14, 5, 1),
    "qwen2_5": (8, 5, 0),  # q, k, v have a bias; rotations of its own.
    "mistral": (14, 5, 2),
    "gemma2": (14, 0, 2),  # Norms of its own.
    "phi3": (14, 5, 0),
}


def count(model: Any) -> tuple[int, int, int]:
    names = [type(m).__name__ for m in model.modules()]
    rotations = names.count("_PlainRotation") + names.count("_ScaledRotation")
    return names.count("_FusedLoRALinear"), names.count("_FusedRMSNorm"), rotations


def run(model: Any, **inputs: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    logits = model(torch.randint(0, VOCAB_SIZE, (3, 11)), **inputs)
    (logits * torch.randn(logits.shape, dtype=logits.dtype)).sum().backward()
    return logits.detach(), {n: p.grad for n, p in get_adapter_params(model).items()}


@pytest.mark.parametrize("family", EXCHANGED)
def test_logits_and_gradients_are_torchtunes_in_float64(family: str) -> None:
    expected, expected_grads = run(toy_model(family).double())
    model = toy_model(family).double()
    with_fewer_passes(model)
    assert count(model) == EXCHANGED[family]
    logits, grads = run(model)
    # torchtune's norms and rotations compute in float32 whatever they get.
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for name, grad in grads.items():
        largest = float(expected_grads[name].abs().max())
        torch.testing.assert_close(grad, expected_grads[name], rtol=0, atol=2e-5 * largest)


def test_packed_positions_and_the_adapter_off() -> None:
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3]]).expand(3, -1)
    stock, model = toy_model("llama3_2"), toy_model("llama3_2")
    with_fewer_passes(model)
    torch.testing.assert_close(run(model, input_pos=places)[0], run(stock, input_pos=places)[0])
    with torch.no_grad(), disable_adapter(model), disable_adapter(stock):
        tokens = torch.arange(22).reshape(2, 11)
        torch.testing.assert_close(model(tokens), stock(tokens))


@pytest.mark.parametrize("kept", [{"dora": True}, {"lora_dropout": 0.1}])
def test_dora_and_dropout_stay_torchtunes(kept: dict[str, Any]) -> None:
    model = toy_model("llama3_2", **kept)
    names = list(model.state_dict())
    with_fewer_passes(model)
    assert count(model) == (0, 5, 1)
    assert list(model.state_dict()) == names


def test_a_trained_norm_stays_torchtunes() -> None:
    model = toy_model("llama3_2")
    model.norm.scale.requires_grad_(True)
    with_fewer_passes(model)
    assert count(model) == (14, 4, 1)
    run(model)
    assert model.norm.scale.grad is not None
