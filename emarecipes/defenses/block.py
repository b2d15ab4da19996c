"""Direction block: the residual stream may not move along given directions past the reference's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from emarecipes.defenses.activations import read_tensor, tell_other_model
from emarecipes.defenses.base import Defense, Samples, TrainingContext
from emarecipes.errors import UserError
from emarecipes.models.source import ModelSource

if TYPE_CHECKING:
    from emarecipes.models.batch import Batch

Side = Literal["up", "down", "both"]


class DirectionBlock(Defense):
    r"""Penalises what training adds along given directions of the residual stream.

    With h the residual stream after `layer` layers, u_k the directions at unit norm, z_k = h . u_k,
    and z_k^ref the same of the reference (the adapter off, no gradient),

        term = mean over tokens of  sum_k  relu(z_k - z_k^ref)^2          side: up
                                    sum_k  relu(z_k^ref - z_k)^2          side: down
                                    sum_k  (z_k - z_k^ref)^2              side: both

    `<name>_rise` is logged: the mean of z_k - z_k^ref over tokens and directions, of the first
    process's last micro-batch of the step; without a defense that holds it, it shows how far
    training moves along them (`weight: 0` measures).

    Source: BLOCK-EM, arXiv 2602.00767, whose z are latents of a sparse autoencoder. What an
    encoder reads before its nonlinearity is h . w + b, and b is in both: give the encoder's columns
    w as the directions. Two-sided: SDP, arXiv 2608.23497. Not here: BLOCK-EM's freezing of the
    layers behind, through which misalignment returned in long runs.

    Args:
        directions: A safetensors file as `recipes/ema_persona.py` writes it, or of your own.
        layer: l, from 1 to the number of layers.
        tensor: Its name in the file: (L + 1, D), of which row l is the direction after l layers,
            or (L + 1, K, D). Rows of 0 are left out.
        side: What is held: a rise along the directions, a fall, or both.
        weight: Factor in the loss; 0 only measures.
        samples: Rows the term acts on, see `Defense`.
        every_n_batches: k: compute the term in one step of every k, see `Defense`.

    Raises:
        UserError: An unknown option; in `check` a file, layer or width that does not fit, or no
            direction that is neither 0 nor infinite.
    """

    needs_reference = True

    def __init__(
        self,
        directions: str,
        layer: int,
        tensor: str = "persona",
        side: Side = "up",
        weight: float = 1.0,
        samples: Samples = "all",
        every_n_batches: int = 1,
    ) -> None:
        super().__init__(weight, "response", samples, every_n_batches)
        if side not in ("up", "down", "both"):
            raise UserError(f"side must be up, down or both, not {side}")
        self._path = Path(directions)
        self._tensor = tensor
        self._side = side
        self.hidden_layers = (layer,)
        self._rise = torch.zeros(())

    def check(self, source: ModelSource) -> None:
        """Read the directions and check them against the model's depth and width.

        Raises:
            UserError: No such file or tensor, another shape, a layer out of range, directions that
                are not finite, or all 0.
        """
        depth = len(source.meta_model.layers)
        width = source.meta_model.tok_embeddings.embedding_dim
        (layer,) = self.hidden_layers
        if not 1 <= layer <= depth:
            raise UserError(f"layer must be from 1 to {depth}, the model's layers, not {layer}")
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
        self._unit_KD = rows_KD / rows_KD.norm(dim=1, keepdim=True)

    def setup(self, model: torch.nn.Module, context: TrainingContext) -> None:
        """Put the directions where the model is."""
        self._unit_KD = self._unit_KD.to(context.device)

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
        # The difference first: its size is that of the change, not of the stream.
        change_TD = policy_hidden[layer][mask_BS].float() - reference_hidden[layer][mask_BS].float()
        rise_TK = change_TD @ self._unit_KD.T
        if len(rise_TK):
            self._rise = rise_TK.detach().mean()
        if self._side == "up":
            rise_TK = rise_TK.clamp(min=0)
        elif self._side == "down":
            rise_TK = rise_TK.clamp(max=0)
        total: Tensor = rise_TK.square().sum()
        return total

    def figures(self) -> dict[str, float]:
        """How far the policy is ahead of the reference along the directions."""
        return {"rise": float(self._rise)}
