"""Direction block: the residual stream may not move along given directions past the reference's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from emarecipes.defenses.activations import read_tensor, tell_other_model
from emarecipes.defenses.base import Defense, Samples
from emarecipes.defenses.context import TrainingContext
from emarecipes.defenses.sae import Latents, read_latents
from emarecipes.errors import UserError
from emarecipes.models.source import ModelSource

if TYPE_CHECKING:
    from emarecipes.models.batch import Batch

Side = Literal["up", "down", "both"]

# Whether a rise and a fall are held.
_HELD = {"up": (1.0, 0.0), "down": (0.0, 1.0), "both": (1.0, 1.0)}


class DirectionBlock(Defense):
    r"""Penalises what training adds along given directions of the residual stream.

    With h the residual stream after `layer` layers, u_k the directions at unit norm, z_k = h . u_k,
    and z_k^ref the same of the reference (the adapter off, no gradient),

        term = mean over tokens of  sum_k  relu(z_k - z_k^ref)^2          side: up
                                    sum_k  relu(z_k^ref - z_k)^2          side: down
                                    sum_k  (z_k - z_k^ref)^2              side: both

    With `sae` the z_k are activations of a sparse autoencoder's latents, after its ReLU or
    JumpReLU (see `Latents`), and

        term = mean over tokens of  sum_{k in up} relu(z_k - z_k^ref)^2
                                    + sum_{k in down} relu(z_k^ref - z_k)^2

    A latent that is off in the policy has no gradient: what has fallen to 0 is not raised again.

    `<name>_rise` is logged: the mean of z_k - z_k^ref over tokens and directions (or latents), of
    the first process's last micro-batch of the step; without a defense that holds it, it shows how
    far training moves along them (`weight: 0` measures).

    Source: BLOCK-EM, arXiv 2602.00767: latents of a sparse autoencoder. Two-sided: SDP, arXiv
    2608.23497. Misalignment returned through the layers behind in long runs: `freeze_after`, a key
    of the run, holds these.

    Args:
        directions: A safetensors file as `recipes/ema_persona.py` writes it, or of your own.
        layer: l, from 1 to the number of layers; null: the autoencoder's.
        tensor: Its name in the file: (L + 1, D), of which row l is the direction after l layers,
            or (L + 1, K, D). Rows of 0 are left out. Null: "persona".
        side: What is held: a rise along the directions ("up", null), a fall, or both.
        weight: Factor in the loss; 0 only measures.
        samples: Rows the term acts on, see `Defense`.
        every_n_batches: k: compute the term in one step of every k, see `Defense`.
        sae: Instead of `directions`: a folder that SAELens wrote, see `read_latents`.
        latents: Which latents may not rise, "up", and which may not fall, "down".

    Raises:
        UserError: An unknown option, or those of both kinds; in `check` a file, layer or width that
            does not fit, no direction that is neither 0 nor infinite, or what `read_latents` says.
    """

    needs_reference = True

    def __init__(
        self,
        directions: str | None = None,
        layer: int | None = None,
        tensor: str | None = None,
        side: Side | None = None,
        weight: float = 1.0,
        samples: Samples = "all",
        every_n_batches: int = 1,
        sae: str | None = None,
        latents: dict[Literal["up", "down"], list[int]] | None = None,
    ) -> None:
        super().__init__(weight, "response", samples, every_n_batches)
        if (directions is None) == (sae is None):
            raise UserError("exactly one of directions and sae must be given")
        if sae is None and latents is not None:
            raise UserError("latents: are those of an autoencoder; say sae, or leave it out")
        if sae is None and layer is None:
            raise UserError("layer: after how many layers are the directions?")
        if sae is not None and (tensor is not None or side is not None):
            raise UserError("tensor and side are for directions; with sae, say latents")
        if side not in ("up", "down", "both", None):
            raise UserError(f"side must be up, down or both, not {side}")
        self._path = Path(directions or sae or "")
        self._tensor = tensor or "persona"
        self._side = side or "up"
        self._chosen = None if sae is None else _chosen(latents)
        self._latents: Latents | None = None
        self.hidden_layers = () if layer is None else (layer,)
        self._rise: Tensor | None = None

    def check(self, source: ModelSource) -> None:
        """Read directions or latents and check them against the model's depth and width.

        Raises:
            UserError: No such file or tensor, another shape, a layer out of range or other than the
                autoencoder's, directions that are not finite, or all 0; see `read_latents`.
        """
        depth = len(source.meta_model.layers)
        width = source.meta_model.tok_embeddings.embedding_dim
        if self._chosen is not None:
            self._latents = read_latents(self._path, [k for k, _ in self._chosen], width)
            self._take_layer(self._latents.layer)
            held = [_HELD[side] for _, side in self._chosen]
            self._up_K, self._down_K = torch.tensor(held).T
            model = self._latents.model and self._latents.model.rpartition("/")[2]
            tell_other_model(self._path, model, source, key="sae")
        (layer,) = self.hidden_layers
        if not 1 <= layer <= depth:
            whose = "" if self._latents is None else f": {self._path} reads there"
            raise UserError(
                f"layer must be from 1 to {depth}, the model's layers, not {layer}{whose}"
            )
        if self._chosen is None:
            self._unit_KD = self._read_directions(layer, depth, width, source)
            held = [_HELD[self._side]] * len(self._unit_KD)
            self._up_K, self._down_K = torch.tensor(held).T

    def _take_layer(self, found: int | None) -> None:
        """The autoencoder's layer, where the config names none."""
        if found is None and not self.hidden_layers:
            raise UserError(f"layer: after how many layers is the stream of {self._path}?")
        if found is not None and self.hidden_layers not in ((), (found,)):
            raise UserError(
                f"layer: {self._path} was trained on the stream after {found} layers, not "
                f"{self.hidden_layers[0]}; leave the key out"
            )
        self.hidden_layers = self.hidden_layers or (found,)  # type: ignore[assignment]

    def _read_directions(self, layer: int, depth: int, width: int, source: ModelSource) -> Tensor:
        """Those of a layer, (K, D), at unit norm."""
        found, made_with = read_tensor(self._path, self._tensor, key="directions")
        if found.dim() not in (2, 3) or (len(found), found.shape[-1]) != (depth + 1, width):
            shape = "x".join(map(str, found.shape))
            raise UserError(
                f"directions: {self._path} holds {shape} numbers, the model needs {depth + 1} x "
                f"{width}, or {depth + 1} x directions x {width}: it was made with another model"
            )
        rows_KD = found[layer].float().reshape(-1, width)
        rows_KD = rows_KD[rows_KD.any(dim=1)]
        if not len(rows_KD) or not rows_KD.isfinite().all():
            raise UserError(f"directions: {self._path}: row {layer} is zero or not finite")
        tell_other_model(self._path, made_with, source, key="directions")
        unit_KD: Tensor = rows_KD / rows_KD.norm(dim=1, keepdim=True)
        return unit_KD

    def setup(self, model: torch.nn.Module, context: TrainingContext) -> None:
        """Put the directions where the model is."""
        self._up_K, self._down_K = self._up_K.to(context.device), self._down_K.to(context.device)
        if self._latents is None:
            self._unit_KD = self._unit_KD.to(context.device)
        else:
            self._latents = self._latents.to(context.device)

    def hidden_term(
        self,
        policy_hidden: Mapping[int, Tensor],
        reference_hidden: Mapping[int, Tensor] | None,
        batch: Batch,
    ) -> Tensor:
        """Scalar: the sum over the batch's tokens and directions."""
        assert reference_hidden is not None
        (layer,) = self.hidden_layers
        mask_BS = self.positions(batch)
        policy_TD = policy_hidden[layer][mask_BS].float()
        reference_TD = reference_hidden[layer][mask_BS].float()
        if self._latents is None:
            # The difference first: its size is that of the change, not of the stream.
            rise_TK = (policy_TD - reference_TD) @ self._unit_KD.T
        else:
            rise_TK = self._latents(policy_TD) - self._latents(reference_TD)
        if len(rise_TK):
            self._rise = rise_TK.detach().mean()
        held_TK = torch.where(rise_TK > 0, self._up_K, self._down_K)
        total: Tensor = (held_TK * rise_TK).square().sum()
        return total

    def figures(self) -> dict[str, float]:
        """How far the policy is ahead of the reference along the directions, in this step."""
        rise, self._rise = self._rise, None
        return {} if rise is None else {"rise": float(rise)}


def _chosen(latents: Mapping[Literal["up", "down"], Sequence[int]] | None) -> list[tuple[int, str]]:
    """Each latent and the side that it is held on."""
    found = [(k, side) for side, numbers in (latents or {}).items() for k in numbers]
    if not found or not set(latents or {}) <= {"up", "down"}:
        raise UserError("latents: say which, as {up: [...], down: [...]}, at least one")
    numbers = [k for k, _ in found]
    twice = [k for k in numbers if numbers.count(k) > 1]
    if twice:
        raise UserError(f"latents: {twice[0]} is there twice")
    return [(k, str(side)) for k, side in found]
