"""From torchtune's layout to Hugging Face's, by torchtune's private converters, with two repairs.

The converters change names, reorder the rows of query and key projections, and fuse weights.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.models.convert_weights import tune_to_hf
from torchtune.models.gemma2._convert_weights import gemma2_tune_to_hf
from torchtune.models.phi3._convert_weights import phi3_tune_to_hf
from torchtune.models.qwen2._convert_weights import qwen2_tune_to_hf
from torchtune.modules.peft.dora import DoRALinear, linear_nf4  # torchao has moved the latter

from emarecipes.errors import UserError
from emarecipes.models.families import names
from emarecipes.models.families.blocks import Decoder
from emarecipes.models.families.known import shape_of

_LLAMA_LIKE = ("GEMMA", "LLAMA2", "LLAMA3", "LLAMA3_2", "MISTRAL")
_PHI = ("PHI3_MINI", "PHI4")
MODEL_TYPES = tuple(sorted((*_LLAMA_LIKE, *_PHI, "GEMMA2", "QWEN2", names.CONFIG_JSON)))


def read_base_config(base_dir: Path, model: nn.Module) -> dict[str, Any]:
    """Read the base model's ``config.json`` and check that it describes `model`.

    torchtune's loader orders the rows of query and key projections by the number of heads in this
    file, so a model built with another number is wrong before any export.

    Args:
        base_dir: folder of the base model in Hugging Face's format.
        model: torchtune's ``TransformerDecoder``, on any device.

    Raises:
        UserError: if the file is missing or its heads are not the model's.
    """
    path = base_dir / "config.json"
    if not path.is_file():
        raise UserError(f"{base_dir}: no config.json; give the folder the base model was read from")
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(model, Decoder):
        stated_shape = replace(shape_of(config, str(path)), max_seq_len=model.shape.max_seq_len)
        if stated_shape != model.shape:
            raise UserError(f"{path}: the model was built of another config.json")
        return config
    for attention in (m for m in model.modules() if hasattr(m, "num_kv_heads")):
        built = (attention.num_heads, attention.num_kv_heads)
        stated = (config["num_attention_heads"], config["num_key_value_heads"])
        if built != stated:
            raise UserError(
                f"{path}: {stated[0]} heads and {stated[1]} key-value heads, but the model was "
                f"built with {built[0]} and {built[1]}; use the builder of this very model"
            )
    return config


def fix_loaded_state(state: dict[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """Repair what torchtune's converter from Hugging Face's format gets wrong.

    In Gemma 2 it exchanges the norms before and after the MLP: ``pre_feedforward_layernorm`` ends
    up in ``mlp_scale``, which torchtune applies after the MLP, and ``post_feedforward_layernorm``
    in ``mlp_norm``, applied before. Call it exactly once on what ``FullModelHFCheckpointer``
    loads; a second call undoes the first. Other families are returned as they are.

    Args:
        state: model weights in torchtune's layout; not changed.
        model_type: name of torchtune's ``ModelType``.
    """
    if model_type != "GEMMA2":
        return state
    other = {"mlp_norm": "mlp_scale", "mlp_scale": "mlp_norm"}
    return {
        ".".join(other.get(part, part) for part in name.split(".")): tensor
        for name, tensor in state.items()
    }


def to_hf(
    state: dict[str, Tensor], model_type: str, config: dict[str, Any], *, columns: int | None = None
) -> dict[str, Tensor]:
    """Convert weights from torchtune's layout to Hugging Face's, as torchtune would, repaired.

    Fused weights (Phi-3) need all their parts in `state`.

    Args:
        state: weights of shape (out, in) and others, in torchtune's layout, with the true (not
            torchtune's exchanged) Gemma 2 norms; not changed.
        model_type: name of torchtune's ``ModelType``.
        config: the base model's ``config.json``.
        columns: width of the weights if it is not the model's.

    Raises:
        UserError: if `model_type` has no converter here.
    """
    if model_type not in MODEL_TYPES:
        raise UserError(f"model_type {model_type}: cannot be exported; known: {MODEL_TYPES}")
    if model_type == names.CONFIG_JSON:
        return names.to_hf(state, config)
    if model_type in _PHI:
        return dict(phi3_tune_to_hf(state))
    heads = config["num_attention_heads"]
    sizes = {
        "num_heads": heads,
        "num_kv_heads": config["num_key_value_heads"],
        "dim": config["hidden_size"] if columns is None else columns,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
    }
    if model_type == "QWEN2":
        return dict(qwen2_tune_to_hf(state, **sizes))
    if model_type == "GEMMA2":
        return dict(gemma2_tune_to_hf(fix_loaded_state(state, model_type), **sizes))
    return dict(tune_to_hf(state, **sizes))


class PlainBiasDoRALinear(DoRALinear):
    """DoRA on a layer with a bias, which the magnitude leaves alone.

    y = m / ||W + s B A|| * (W x + s B A x) + b, as in the paper (Liu et al., 2024, eq. 5) and in
    PEFT. torchtune's own forward scales the bias as well.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Compute y of shape (..., out) for x of shape (..., in)."""
        if self.disabled:
            unadapted: Tensor = super().forward(x)
            return unadapted
        # Through the submodules' __call__, not their weights, for the sake of FSDP's hooks.
        lora_out = self.lora_b(self.lora_a(self.dropout(x)))
        eye = torch.eye(self.in_dim, device=x.device, dtype=x.dtype)
        update = self.lora_b(self.lora_a(eye)).T
        norm = self._get_weight_norm(self.weight.to(x.dtype), update.detach()).detach()
        plain = linear_nf4(x, self.weight) if self._quantize_base else F.linear(x, self.weight)
        scaled = self.magnitude / norm * (plain + self.scaling * lora_out)
        # The magnitude may be held in more precision.
        biased: Tensor = scaled.to(x.dtype) + self.bias
        return biased


def fix_dora_bias(model: nn.Module) -> None:
    """Make torchtune's DoRA layers that have a bias (Qwen 2: q, k, v) leave it unscaled, in place.

    Call it before the model's first forward; sharding may come before or after. Without it the
    trained model has no form in PEFT. Parameters and their names stay the same.
    """
    for module in model.modules():
        if type(module) is DoRALinear and module.bias is not None:
            module.__class__ = PlainBiasDoRALinear
