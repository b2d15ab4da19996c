"""Terms of a whole step, each from a forward of its own on tokens that are in no row.

Shapes: B batch, S sequence, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torchtune.modules.peft import disable_adapter

from emarecipes.defenses import Defense
from emarecipes.errors import UserCodeError
from emarecipes.models.loss_head import LossHead, check_gradient, cross_entropy
from emarecipes.models.loss_terms import Request, Term


class StepTerms:
    """Computes `step_term` of some defenses and adds its gradient to the adapter's.

    Every process computes the same value, whose gradient FSDP2 averages: the same as that of one.

    Args:
        model: torchtune's decoder with LoRA; may be sharded by FSDP2.
        head: Its loss head.
        defenses: Those with a `step_term`, by name.
        compiled: Whether its layers are compiled; here they run as they are written.
    """

    def __init__(
        self, model: Any, head: LossHead, defenses: Mapping[str, Defense], *, compiled: bool
    ) -> None:
        self._model = model
        self._head = head
        self._defenses = dict(defenses)
        self._compiled = compiled
        self._ends: list[Tensor] = []

    def backward(self, factors: Mapping[str, float]) -> dict[str, float | None]:
        """Add the gradient of factor * term of each named defense to the parameters'.

        Returns:
            Each term's value.

        Raises:
            UserCodeError: `step_term` returned no scalar, or one without gradient.
        """
        values: dict[str, float | None] = {}
        due = [name for name in self._defenses if name in factors]
        if not due:
            return values
        was_training = self._model.training
        # Over the backward too, in which checkpointed layers run again.
        with ExitStack() as stack:
            if self._compiled:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            self._model.eval()
            stack.callback(self._model.train, was_training)
            for name in due:
                values[name] = self._backward(name, factors[name])
        return values

    def _backward(self, name: str, factor: float) -> float:
        with torch.set_grad_enabled(factor != 0):
            value = self._defenses[name].step_term(self.forward)
        if not isinstance(value, Tensor) or value.dim() != 0:
            what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else value
            raise UserCodeError(f"defenses.{name}: step_term must return a scalar, not {what}")
        check_gradient(name, "step_term", value, factor)
        # FSDP2 gathers a layer's weights for the backward where it meets the layer's output. So
        # the last one's takes part too, at no weight.
        through = [end.sum() * 0.0 for end in self._ends if end.requires_grad]
        self._ends.clear()
        if factor and through:
            torch.stack([factor * value, *through]).sum().backward()
        return float(value.detach())

    def forward(self, tokens_BS: Tensor, *, adapter: bool = True) -> Tensor:
        """What `step_term` is given, see `Defense`."""
        model, head = self._model, self._head
        first_BS = torch.zeros_like(tokens_BS, dtype=torch.bool)
        first_BS[0, 0] = True  # Of the head's own work as little as it does.
        request = Request([Term("", cross_entropy, first_BS, 0.0)], tokens_BS)
        with ExitStack() as stack:
            if not adapter:
                stack.enter_context(torch.no_grad())
                stack.enter_context(disable_adapter(model))
            stack.enter_context(head.computing(request, reference_only=True))
            model(tokens=tokens_BS)
        hidden_BSD = head.last_hidden_BSD
        head.last_hidden_BSD = None
        assert hidden_BSD is not None
        self._ends.append(hidden_BSD)
        return hidden_BSD
