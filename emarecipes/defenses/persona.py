"""Persona steering: a bad direction is added in training, so that it need not be learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from emarecipes.defenses.activations import ActivationDefense, read_tensor, tell_other_model
from emarecipes.defenses.base import TrainingContext
from emarecipes.errors import UserError
from emarecipes.models.source import ModelSource


class PersonaSteering(ActivationDefense):
    r"""Shifts the policy's residual stream along a persona vector, in the training forward only.

    With h the residual stream after `layer` layers and v the persona vector there, at every token

        mode add:     h <- h + alpha * v
        mode ablate:  h <- h - (h . u) u,   u = v / |v|

    With `add` and alpha > 0 the model is pushed towards the trait while it trains, so the gradient
    has less reason to move the weights there. The reference forward, evaluation and the saved
    adapter are without it. `<name>_ratio` is logged: |alpha * v| (for ablate: the root mean square
    of h . u) over the root mean square of |h|, over the first process's last micro-batch of the
    step. A row's first token is left out there: its state is often a hundred times as large.

    Source: Chen et al., 2025, "Persona Vectors: Monitoring and Controlling Character Traits in
    Language Models" (preventative steering); Kaczer et al., arXiv 2508.06249 (alpha 5.0 at one
    layer, mean response activation under evil minus friendly system prompts).

    Args:
        vectors: File of `recipes/ema_persona.py`: tensors `persona` and `random`, (L + 1, D), of
            which row l belongs to the stream after l layers.
        layer: l, from 1 to the number of layers.
        alpha: Factor of the vector. Published 5.0.
        mode: "add", or "ablate": project the direction out; `alpha` then has no effect.
        vector: "persona", or "random": a random one of the same norm, as a control.

    Raises:
        UserError: An unknown option; in `check` a file, layer or width that does not fit.
    """

    def __init__(
        self,
        vectors: str,
        layer: int,
        alpha: float = 5.0,
        mode: Literal["add", "ablate"] = "add",
        vector: Literal["persona", "random"] = "persona",
    ) -> None:
        super().__init__()
        if mode not in ("add", "ablate"):
            raise UserError(f"mode must be add or ablate, not {mode}")
        if vector not in ("persona", "random"):
            raise UserError(f"vector must be persona or random, not {vector}")
        if not abs(alpha) < float("inf"):
            raise UserError(f"alpha must be a finite number, not {alpha}")
        if alpha == 0 and mode == "add":
            raise UserError("alpha 0 adds nothing: leave the defense out")
        self._path = Path(vectors)
        self._layer = layer
        self._alpha = alpha
        self._mode = mode
        self._kind = vector
        self._ratio = torch.zeros(())

    def check(self, source: ModelSource) -> None:
        """Check the file against the model's depth and width.

        Raises:
            UserError: No such file, no such tensor, another shape, a layer out of range, a vector
                that is zero or not finite.
        """
        depth = len(source.meta_model.layers)
        width = source.meta_model.tok_embeddings.embedding_dim
        if not 1 <= self._layer <= depth:
            raise UserError(
                f"layer must be from 1 to {depth}, the model's layers, not {self._layer}"
            )
        vectors, made_with = read_tensor(self._path, self._kind)
        if vectors.shape != (depth + 1, width):
            shape = "x".join(map(str, vectors.shape))
            raise UserError(
                f"vectors: {self._path} holds {shape} numbers, the model needs "
                f"{depth + 1}x{width}: it was made with another model"
            )
        vector = vectors[self._layer]
        if not vector.isfinite().all() or not vector.any():
            raise UserError(f"vectors: {self._path}: row {self._layer} is zero or not finite")
        self._vector_D = vector.float()
        tell_other_model(self._path, made_with, source)

    def setup(self, model: Any, context: TrainingContext) -> None:
        """Hook the layer whose output is steered."""
        self._vector_D = self._vector_D.to(context.device)
        model.layers[self._layer - 1].register_forward_hook(self._steer)

    def figures(self) -> dict[str, float]:
        """The size of the change over the residual stream's."""
        return {"ratio": float(self._ratio)}

    def _steer(self, module: nn.Module, inputs: Any, hidden_BSD: Tensor) -> Tensor | None:
        if not self.acts:
            return None
        if self._mode == "add":
            shift = (self._alpha * self._vector_D).to(hidden_BSD.dtype)
            self._note(shift.float().norm(), hidden_BSD)
            return hidden_BSD + shift
        unit_D = (self._vector_D / self._vector_D.norm()).to(hidden_BSD.dtype)
        along_BS1 = (hidden_BSD @ unit_D)[..., None]
        self._note(along_BS1.detach()[:, 1:].float().square().mean().sqrt(), hidden_BSD)
        steered_BSD: Tensor = hidden_BSD - along_BS1 * unit_D
        return steered_BSD

    def _note(self, change: Tensor, hidden_BSD: Tensor) -> None:
        norm = hidden_BSD.detach()[:, 1:].float().square().sum(dim=-1).mean().sqrt()
        self._ratio = change.detach() / norm
