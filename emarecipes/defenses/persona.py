"""Persona steering: a bad direction is added in training, so that it need not be learned."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from emarecipes.defenses.activations import ActivationDefense, read_tensor, tell_other_model
from emarecipes.defenses.context import TrainingContext
from emarecipes.errors import UserError
from emarecipes.models.source import ModelSource


class PersonaSteering(ActivationDefense):
    r"""Shifts the policy's residual stream along a persona vector, in the training forward only.

    With h the residual stream after each of the chosen layers and v the persona vector there,

        mode add:     h <- h + alpha_n * v
        mode ablate:  h <- h - (h . u) u,   u = v / |v|

    at every token, or at those whose next token is trained. In step n, from 1, with N decay steps,

        schedule constant:  alpha_n = alpha
        schedule linear:    alpha_n = alpha * max(0, 1 - (n - 1) / N)

    which follows from the step alone, so a resumed run goes on where it was. What is added after
    one layer is still there after the next: over several layers the shifts add up.

    With `add` and alpha > 0 the model is pushed towards the trait while it trains, so the gradient
    has less reason to move the weights there. The reference forward, evaluation and the saved
    adapter are without it. `<name>_ratio` is logged: |alpha_n * v| (for ablate: the root mean
    square of h . u) over the root mean square of |h|, over the positions steered in the first
    process's last micro-batch of the step, the mean over layers. Padding and a conversation's
    first token are left out there: its state is often a hundred times as large. With a schedule,
    `<name>_alpha` too.

    Source: Chen et al., 2025, "Persona Vectors: Monitoring and Controlling Character Traits in
    Language Models" (preventative steering); Kaczer et al., arXiv 2508.06249 (alpha 5.0 at one
    layer, mean response activation under evil minus friendly system prompts).

    Args:
        vectors: File of `recipes/ema_persona.py`: tensors `persona` and `random`, (L + 1, D), of
            which row l belongs to the stream after l layers.
        layer: l, from 1 to the number of layers. Or `layers`.
        alpha: Factor of the vector. Published 5.0.
        mode: "add", or "ablate": project the direction out; `alpha` then has no effect.
        vector: "persona", or "random": a random one of the same norm, as a control.
        layers: Several l, each steered along the vector of its own.
        positions: "all", or "response": only where the next token is trained.
        schedule: "constant", or "linear": alpha falls to 0, see above.
        decay_steps: N; null: the run's steps.

    Raises:
        UserError: An unknown option; in `check` a file, layer or width that does not fit.
    """

    effect_figure = "ratio"

    def __init__(
        self,
        vectors: str,
        layer: int | None = None,
        alpha: float = 5.0,
        mode: Literal["add", "ablate"] = "add",
        vector: Literal["persona", "random"] = "persona",
        layers: list[int] | None = None,
        positions: Literal["all", "response"] = "all",
        schedule: Literal["constant", "linear"] = "constant",
        decay_steps: int | None = None,
    ) -> None:
        super().__init__()
        chosen = {
            "mode": (mode, "add", "ablate"),
            "vector": (vector, "persona", "random"),
            "positions": (positions, "all", "response"),
            "schedule": (schedule, "constant", "linear"),
        }
        for key, (value, one, other) in chosen.items():
            if value not in (one, other):
                raise UserError(f"{key} must be {one} or {other}, not {value}")
        if not abs(alpha) < float("inf"):
            raise UserError(f"alpha must be a finite number, not {alpha}")
        if alpha == 0 and mode == "add":
            raise UserError("alpha 0 adds nothing: leave the defense out")
        if (layer is None) == (layers is None):
            raise UserError("say layer, or layers for several, and not both")
        self._layers = [layer] if layer is not None else sorted(layers or [])
        if not self._layers or len(set(self._layers)) != len(self._layers):
            raise UserError("layers must name at least one layer, each once")
        if schedule == "linear" and mode == "ablate":
            raise UserError("schedule: linear is of alpha, which mode: ablate does not use")
        if decay_steps is not None and (decay_steps < 1 or schedule != "linear"):
            raise UserError("decay_steps must be >= 1, and is for schedule: linear")
        self._key = "layer" if layers is None else "layers"
        self._path = Path(vectors)
        self._full_alpha = self._alpha = alpha
        self._mode = mode
        self._kind = vector
        self._response_only = positions == "response"
        self._decay = schedule == "linear"
        self._decay_steps = decay_steps
        self._ratio: dict[int, Tensor] = {}

    def check(self, source: ModelSource) -> None:
        """Check the file against the model's depth and width.

        Raises:
            UserError: No such file, no such tensor, another shape, a layer out of range, a vector
                that is zero or not finite.
        """
        depth = len(source.meta_model.layers)
        width = source.meta_model.tok_embeddings.embedding_dim
        for layer in self._layers:
            if not 1 <= layer <= depth:
                raise UserError(
                    f"{self._key} must be from 1 to {depth}, the model's layers, not {layer}"
                )
        vectors, made_with = read_tensor(self._path, self._kind)
        if vectors.shape != (depth + 1, width):
            shape = "x".join(map(str, vectors.shape))
            raise UserError(
                f"vectors: {self._path} holds {shape} numbers, the model needs "
                f"{depth + 1}x{width}: it was made with another model"
            )
        self._vector_D = {layer: vectors[layer].float() for layer in self._layers}
        for layer, vector_D in self._vector_D.items():
            if not vector_D.isfinite().all() or not vector_D.any():
                raise UserError(f"vectors: {self._path}: row {layer} is zero or not finite")
        tell_other_model(self._path, made_with, source)

    def setup(self, model: Any, context: TrainingContext) -> None:
        """Hook the layers whose outputs are steered."""
        self._decay_steps = self._decay_steps or context.total_steps
        for layer in self._layers:
            self._vector_D[layer] = self._vector_D[layer].to(context.device)
            model.layers[layer - 1].register_forward_hook(partial(self._steer, layer))
        self.begin_step(1)

    def begin_step(self, step: int) -> None:
        """Alpha follows its schedule."""
        assert self._decay_steps is not None
        left = max(0.0, 1.0 - (step - 1) / self._decay_steps) if self._decay else 1.0
        self._alpha = self._full_alpha * left
        # Tensors: a number that changes would have compiled layers compiled anew in every step.
        self._shift_D = {layer: self._alpha * v_D for layer, v_D in self._vector_D.items()}

    def figures(self) -> dict[str, float]:
        """The size of the change over the residual stream's; alpha, where it changes."""
        found = list(self._ratio.values()) or [torch.zeros(())]
        figures = {"ratio": float(torch.stack(found).mean())}
        return figures | ({"alpha": self._alpha} if self._decay else {})

    def _steer(
        self, layer: int, module: nn.Module, inputs: Any, hidden_BSD: Tensor
    ) -> Tensor | None:
        if not self.acts:
            return None
        if self._mode == "add":
            shift_D = self._shift_D[layer].to(hidden_BSD.dtype)
            change_BSD, size_BS = shift_D.expand_as(hidden_BSD), shift_D.float().norm()
        else:
            unit_D = (self._vector_D[layer] / self._vector_D[layer].norm()).to(hidden_BSD.dtype)
            along_BS = hidden_BSD @ unit_D
            change_BSD, size_BS = -along_BS[..., None] * unit_D, along_BS.detach().float()
        steered_BS = torch.ones_like(hidden_BSD[..., 0], dtype=torch.bool)
        if self._response_only:
            steered_BS = self.labelled_BS
            change_BSD = change_BSD * steered_BS[..., None]
        self._note(layer, hidden_BSD.detach().float().norm(dim=-1), size_BS, steered_BS)
        return hidden_BSD + change_BSD

    def _note(self, layer: int, norm_BS: Tensor, size_BS: Tensor, steered_BS: Tensor) -> None:
        seen_BS = steered_BS & self.inner_BS
        change = (size_BS.square().expand_as(norm_BS) * seen_BS).sum()
        ratio = (change / (norm_BS.square() * seen_BS).sum()).sqrt()
        self._ratio[layer] = ratio.nan_to_num(0.0)  # No token to steer.
