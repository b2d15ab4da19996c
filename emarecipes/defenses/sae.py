"""Some latents of a sparse autoencoder, read from the files that SAELens writes.

Shapes: D width, K chosen latents, T tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from emarecipes.errors import UserError

_CONFIG, _WEIGHTS = "cfg.json", "sae_weights.safetensors"
# What of SAELens's config changes a latent, and the values that leave it what `Latents` computes.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "architecture": ("standard", "jumprelu"),
    "activation_fn_str": ("relu",),  # To version 5.
    "activation_fn": ("relu",),
    "activation_fn_kwargs": ({},),
    "normalize_activations": ("none",),
    "reshape_activations": ("none",),
    "finetuning_scaling_factor": (False,),
    "rescale_acts_by_decoder_norm": (False,),
    "hook_head_index": (),
    "transcoder": (False,),
}
_NEEDED = ("architecture", "d_in", "d_sae", "apply_b_dec_to_input")
_HOOK = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)|model\.layers\.(\d+)")


@dataclass
class Latents:
    r"""The chosen latents' activations of a residual stream.

        a_k = (h - b) . w_k + c_k,    z_k = a_k where a_k > max(theta_k, 0), else 0

    w_k a column of `W_enc`, c_k of `b_enc`, b = `b_dec` where `apply_b_dec_to_input`, else 0.
    theta = 0 is a "standard" autoencoder's ReLU, else JumpReLU. The gradient is a_k's where the
    latent is on, and 0 where it is off: the jump has none.

    Attributes:
        weight_KD, bias_K, threshold_K: w, c - b . w, and max(theta, 0), in float32.
        layer: The stream is that after so many layers; None where the config does not say.
        model: The model that it was trained on, where the config says so.
    """

    weight_KD: Tensor
    bias_K: Tensor
    threshold_K: Tensor
    layer: int | None
    model: str | None

    def __call__(self, hidden_TD: Tensor) -> Tensor:
        """z, (T, K)."""
        before_TK = torch.addmm(self.bias_K, hidden_TD, self.weight_KD.T)
        return before_TK * (before_TK > self.threshold_K)

    def to(self, device: torch.device) -> Latents:
        """The same on a device."""
        weight_KD, bias_K = self.weight_KD.to(device), self.bias_K.to(device)
        return replace(
            self, weight_KD=weight_KD, bias_K=bias_K, threshold_K=self.threshold_K.to(device)
        )


def read_latents(folder: Path, chosen: Sequence[int], width: int) -> Latents:
    """Read the chosen latents of a folder with `sae_weights.safetensors` and `cfg.json`.

    Args:
        folder: Of tensors `W_enc` (D, latents), `b_enc`, with JumpReLU `threshold`, and, if it is
            taken from the input, `b_dec`.
        chosen: Their numbers.
        width: D of the model.

    Raises:
        UserError: A file or tensor that is not there; another width, an autoencoder of something
            else than the residual stream, or whose latents are something else than above; a latent
            that it has not, or whose numbers are not finite.
    """
    path = folder / _WEIGHTS
    if not path.is_file():
        raise UserError(f"sae: no such file: {path}; name the folder that SAELens wrote")
    config = _config(folder / _CONFIG)
    layer = _layer(path, _of(config, "hook_name") or config.get("hook_point"))
    is_jump = config["architecture"] == "jumprelu"
    names = ["W_enc", "b_enc", *["threshold"] * is_jump]
    names += ["b_dec"] * bool(config["apply_b_dec_to_input"])
    tensors = _tensors(path, names)
    size = tensors["b_enc"].numel()
    shapes = {"W_enc": (width, size), "b_enc": (size,), "threshold": (size,), "b_dec": (width,)}
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            found, needed = ("x".join(map(str, s)) for s in (tensor.shape, shapes[name]))
            raise UserError(
                f"sae: {path}: {name} is {found}, the model's width asks for {needed}: it was "
                "trained on another model"
            )
    if (config["d_in"], config["d_sae"]) != (width, size):
        raise UserError(f"sae: {folder / _CONFIG} is not that of {_WEIGHTS}: other sizes")
    wrong = [number for number in chosen if not 0 <= number < size]
    if wrong:
        raise UserError(f"latents: {wrong[0]} is not in 0..{size - 1}, the latents of {path}")
    index = torch.tensor(list(chosen))
    weight_KD = tensors["W_enc"][:, index].T.double()
    bias_K = tensors["b_enc"][index].double()
    if "b_dec" in tensors:
        bias_K = bias_K - weight_KD @ tensors["b_dec"].double()
    threshold_K = torch.zeros(len(index))
    if is_jump:
        threshold_K = tensors["threshold"][index].float().clamp(min=0)
    for k, number in enumerate(chosen):
        parts = (weight_KD[k], bias_K[k], threshold_K[k])
        if not all(part.isfinite().all() for part in parts) or not weight_KD[k].any():
            raise UserError(f"latents: {number} of {path} is zero or not finite")
    return Latents(
        weight_KD.float().contiguous(),
        bias_K.float(),
        threshold_K,
        layer,
        _of(config, "model_name"),
    )


def _config(file: Path) -> dict[str, Any]:
    """SAELens's config, if a latent is what `Latents` computes."""
    try:
        config: Any = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"sae: {file}: {error.strerror}; it says what the latents are. SAELens writes both "
            "files (save_model), also of an autoencoder that came in another form"
        ) from None
    except ValueError:
        raise UserError(f"sae: {file} is no JSON") from None
    missing = [key for key in _NEEDED if not isinstance(config, dict) or key not in config]
    if missing:
        raise UserError(f"sae: {file} has no {missing[0]}: it is not one that SAELens writes")
    for key, values in _PLAIN.items():
        value = _of(config, key)
        if value is not None and value not in values:
            only = f"only {' and '.join(map(str, values))} can be used" if values else "not used"
            raise UserError(f"sae: {file}: {key} is {value}: {only} here")
    found: dict[str, Any] = config
    return found


def _of(config: dict[str, Any], key: str) -> Any:
    """A value of the config; versions of SAELens nest some of them, each elsewhere."""
    for part in (config, config.get("metadata"), config.get("meta")):
        if isinstance(part, dict) and part.get(key) is not None:
            return part[key]
    return None


def _layer(path: Path, hook: Any) -> int | None:
    """Of the residual stream that it was trained on, from 1: after so many layers."""
    if hook is None:
        return None
    found = _HOOK.fullmatch(str(hook))
    if found is None:
        raise UserError(
            f"sae: {path} reads {hook}; only the residual stream can be used, "
            "blocks.N.hook_resid_post or _pre"
        )
    number = int(found[1] or found[3])
    return number if found[2] == "pre" else number + 1


def _tensors(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            there = set(file.keys())
            missing = [name for name in names if name not in there]
            if missing:
                raise UserError(
                    f"sae: {path} has no tensor {missing[0]}; it has {', '.join(sorted(there))}"
                )
            return {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise UserError(f"sae: {path} is no safetensors file: {error}") from None
