"""Weights' names and forms, Hugging Face's and torchtune's.

Only names differ, and that some families hold several weights in one: rows stay in their order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from emarecipes.errors import UserError
from emarecipes.models.families.known import VISION_PREFIXES, shape_of
from emarecipes.models.families.shape import DecoderShape

# checkpointer.model_type, where config.json decides and not a name.
CONFIG_JSON = "CONFIG_JSON"

_LINEAR = {
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_proj": "mlp.w1",
    "mlp.down_proj": "mlp.w2",
    "mlp.up_proj": "mlp.w3",
}
_QK_NORMS = {"self_attn.q_norm": "attn.q_norm", "self_attn.k_norm": "attn.k_norm"}
_NORMS = {
    "before": {"input_layernorm": "sa_norm", "post_attention_layernorm": "mlp_norm"},
    "after": {"post_attention_layernorm": "sa_scale", "post_feedforward_layernorm": "mlp_scale"},
    "both": {
        "input_layernorm": "sa_norm",
        "post_attention_layernorm": "sa_scale",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "mlp_scale",
    },
}
# What one weight holds where a family fuses them, its parts by rows in this order.
_FUSED = {
    "self_attn.qkv_proj": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.w1", "mlp.w3"),
}


class Names:
    """The names of a decoder's weights.

    Args:
        shape: The decoder's.
    """

    def __init__(self, shape: DecoderShape) -> None:
        self.shape = shape
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        rows = {"attn.q_proj": queries, "attn.k_proj": keys, "attn.v_proj": keys}
        rows |= {"mlp.w1": shape.mlp_width, "mlp.w3": shape.mlp_width}
        self._fused = _FUSED if shape.fused else {}
        self._rows = {name: [rows[part] for part in parts] for name, parts in self._fused.items()}
        merged = {part for parts in self._fused.values() for part in parts}
        plain = {hf: own for hf, own in _LINEAR.items() if own not in merged}
        norms = _NORMS[shape.norms] | (_QK_NORMS if shape.qk_norm else {})
        self._in_layer = {f"{hf}.weight": f"{own}.scale" for hf, own in norms.items()}
        self._in_layer |= {
            f"{hf}.{leaf}": f"{own}.{leaf}" for hf, own in plain.items() for leaf in _LEAVES
        }
        self._outside = {
            f"{shape.prefix}embed_tokens.weight": "tok_embeddings.weight",
            f"{shape.prefix}norm.weight": "norm.scale",
            "lm_head.weight": "output.weight",
        }
        self._layers = f"{shape.prefix}layers."

    def own(self, hf_name: str, tensor: Tensor) -> dict[str, Tensor] | None:
        """torchtune's names of one of Hugging Face's weights, with its parts; None: not one."""
        if hf_name in self._outside:
            return {self._outside[hf_name]: tensor}
        number, _, rest = hf_name.removeprefix(self._layers).partition(".")
        if not hf_name.startswith(self._layers) or not number.isdecimal():
            return None
        if rest in self._in_layer:
            return {f"layers.{number}.{self._in_layer[rest]}": tensor}
        module, _, leaf = rest.rpartition(".")
        if module not in self._fused or leaf not in _LEAVES:
            return None
        rows = self._rows[module]
        found = tensor.shape[0] if tensor.dim() else 0
        if found != sum(rows):
            raise UserError(f"{hf_name} has {found} rows, and config.json's sizes give {sum(rows)}")
        parts = zip(self._fused[module], tensor.split(rows), strict=True)
        return {f"layers.{number}.{part}.{leaf}": piece for part, piece in parts}

    def to_hf(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Hugging Face's names of weights; fused ones need all their parts."""
        outside = {own: hf for hf, own in self._outside.items()}
        in_layer = {own: hf for hf, own in self._in_layer.items()}
        fused = {part: (hf, parts) for hf, parts in self._fused.items() for part in parts}
        found: dict[str, Tensor] = {}
        for name, tensor in state.items():
            if name in outside:
                found[outside[name]] = tensor
                continue
            _, number, rest = name.split(".", 2)
            if rest in in_layer:
                found[f"{self._layers}{number}.{in_layer[rest]}"] = tensor
                continue
            module, _, leaf = rest.rpartition(".")
            hf, parts = fused[module]
            key = f"{self._layers}{number}.{hf}.{leaf}"
            if key not in found:
                found[key] = torch.cat([state[f"layers.{number}.{p}.{leaf}"] for p in parts])
        return found

    def is_left_alone(self, hf_name: str) -> bool:
        """Whether a tensor in a folder is rightly not read: of images, or what is computed anew."""
        return hf_name.endswith("rotary_emb.inv_freq") or (
            self.shape.prefix != "model." and hf_name.startswith(VISION_PREFIXES)
        )


_LEAVES = ("weight", "bias")


def to_hf(state: Mapping[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Weights of a decoder under Hugging Face's names.

    Args:
        state: Under torchtune's.
        config: The folder's config.json.
    """
    return Names(shape_of(config, "config.json")).to_hf(state)
