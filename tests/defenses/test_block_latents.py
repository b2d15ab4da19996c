"""DirectionBlock with a sparse autoencoder's latents, against a float64 form of each latent."""

import json
from pathlib import Path
from typing import Any

import pytest
import reference_new_defenses
import torch
from reference import cross_entropy, to_float64
from reference_defenses import adapter_gradients, forward_all
from safetensors.torch import save_file
from toy_loss import assert_same, run
from toy_models import toy_microbatches, toy_model

from emarecipes.defenses import DirectionBlock, ModelSource
from emarecipes.errors import UserError

WIDTH, SIZE = 32, 12
UP, DOWN = [7, 0, 3, 9], [10, 2, 5]
# As SAELens 6 writes it, less what says nothing of a latent.
CONFIG: dict[str, Any] = {
    "d_in": WIDTH,
    "d_sae": SIZE,
    "dtype": "float32",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "metadata": {"model_name": "a/.", "hook_name": "blocks.1.hook_resid_post"},
    "architecture": "jumprelu",
}


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(8)
    shapes = {"W_enc": (WIDTH, SIZE), "b_enc": (SIZE,), "b_dec": (WIDTH,), "threshold": (SIZE,)}
    made = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    return made | {"W_dec": made["W_enc"].T.contiguous()}


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> str:
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    return str(folder)


def slow_latents(
    tensors: dict[str, torch.Tensor], jump: bool, from_input: bool
) -> reference_new_defenses.Latents:
    double = {name: tensor.double() for name, tensor in tensors.items()}

    def latents(h: torch.Tensor) -> list[torch.Tensor]:
        found = []
        for j in UP + DOWN:
            x = h.double() - double["b_dec"] if from_input else h.double()
            z = (x @ double["W_enc"][:, j] + double["b_enc"][j]).relu()
            is_off = jump and float(z.detach()) <= float(double["threshold"][j])
            found.append(z * 0.0 if is_off else z)
        return found

    return latents


@pytest.mark.parametrize(
    ("jump", "from_input", "family"),
    [(True, True, "llama3"), (False, True, "gemma2"), (False, False, "llama3")],
)
def test_the_term_and_its_gradient(
    jump: bool, from_input: bool, family: str, tmp_path: Path
) -> None:
    micro, tensors = toy_microbatches(), weights()
    changed = {
        "architecture": "jumprelu" if jump else "standard",
        "apply_b_dec_to_input": from_input,
    }
    path = write(tmp_path, tensors, CONFIG | changed)
    defense = DirectionBlock(sae=path, latents={"up": UP, "down": DOWN}, weight=0.6)
    found = run(toy_model(family), {"block": defense}, micro)
    double = to_float64(toy_model(family))
    logits, policy = forward_all(double, micro, True)
    with torch.no_grad():
        _, reference = forward_all(double, micro, False)
    sides = ["up"] * len(UP) + ["down"] * len(DOWN)
    slow = slow_latents(tensors, jump, from_input)
    term = reference_new_defenses.direction_block(policy, reference, micro, 2, slow, sides)
    ce = cross_entropy(logits, micro)
    loss = ce + 0.6 * term
    values = {"block": float(term.detach()), "loss": float(loss.detach())}
    assert values["block"] > 0.01
    assert_same(found, (values, adapter_gradients(double, loss)))


def edited(**changes: Any) -> dict[str, Any]:
    return {"config": CONFIG | changes}


@pytest.mark.parametrize(
    ("made", "options", "match"),
    [
        (edited(architecture="topk"), {}, "architecture is topk: only standard and jumprelu"),
        (edited(normalize_activations="layer_norm"), {}, "normalize_activations is layer_norm"),
        (edited(metadata={"hook_name": "blocks.1.hook_mlp_out"}), {}, "only the residual stream"),
        (edited(metadata={}), {}, "layer: after how many layers"),
        (edited(metadata={"hook_name": "blocks.8.hook_resid_pre"}), {}, "not 8: .* reads there"),
        (edited(d_sae=9), {}, "other sizes"),
        ({"config": {"W_enc": 1}}, {}, "cfg.json has no architecture"),
        ({"tensors": {"W_enc": torch.ones(8, SIZE)}}, {}, "W_enc is 8x12, .* asks for 32x12"),
        ({"tensors": {"b_enc": torch.full((SIZE,), torch.nan)}}, {}, "latents: 1 of .* not finite"),
        ({"without": "threshold"}, {}, "has no tensor threshold; it has W_dec, W_enc, b_dec"),
        ({}, {"sae": "absent"}, "no such file: absent/sae_weights.safetensors; name the folder"),
        ({}, {"layer": 1}, "trained on the stream after 2 layers, not 1"),
        ({}, {"latents": {"up": [1, SIZE]}}, "latents: 12 is not in 0..11"),
        ({}, {"latents": {"up": [1], "down": [1]}}, "latents: 1 is there twice"),
        ({}, {"latents": {"left": [1]}}, "latents: say which"),
        ({}, {"latents": None}, "latents: say which"),
        ({}, {"side": "up"}, "tensor and side are for directions"),
        ({}, {"directions": "x"}, "exactly one of directions and sae"),
    ],
)
def test_what_does_not_fit(
    made: dict[str, Any], options: dict[str, Any], match: str, tmp_path: Path
) -> None:
    tensors = weights() | made.get("tensors", {})
    tensors.pop(made.get("without", ""), None)
    path = write(tmp_path, tensors, made.get("config", CONFIG))
    source = ModelSource(toy_model("llama3"), Path(), "LLAMA3")
    with pytest.raises(UserError, match=match):
        given: dict[str, Any] = {"sae": path, "latents": {"up": [1]}} | options
        DirectionBlock(**given).check(source)
