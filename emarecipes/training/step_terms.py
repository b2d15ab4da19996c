"""Terms of a whole step, each from a forward of its own on tokens that are in no row.

Shapes: B batch, S sequence, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torchtune.modules.peft import disable_adapter

from emarecipes.defenses import Defense
from emarecipes.errors import UserCodeError
from emarecipes.models.batch import Batch
from emarecipes.models.loss_head import LossHead, check_gradient, cross_entropy
from emarecipes.models.loss_terms import Request, Term


class StepTerms:
    """Computes `step_term` of some defenses and adds its gradient to the adapter's.

    Every process computes the same value, whose gradient FSDP2 averages: the same as that of one.

    Args:
        model: torchtune's decoder with LoRA; may be sharded by FSDP2.
        head: Its loss head.
        defenses: All, by name; terms are of those with a `step_term`.
        compiled: Whether its layers are compiled; here they run as they are written.
    """

    def __init__(
        self, model: Any, head: LossHead, defenses: Mapping[str, Defense], *, compiled: bool
    ) -> None:
        self._model = model
        self._head = head
        self._defenses = {n: d for n, d in defenses.items() if d.has("step_term")}
        self._compiled = compiled
        self._changed = compiled or any(d.has("policy_forward") for d in defenses.values())
        self._ends: list[Tensor] = []
        self._found: dict[str, Tensor] = {}  # In this step's rows.

    def begin_step(self) -> None:
        """No term of the step has been read yet."""
        self._found.clear()

    @contextmanager
    def in_rows(
        self, batch: Batch, wanted: Sequence[str]
    ) -> Iterator[Callable[[], Tensor | float]]:
        """Around the policy's forward of a micro-batch: reads the wanted terms that its rows hold.

        Gives what returns their weighted sum afterwards, to be added to the loss. `backward` then
        knows their values. What is only measured has no part in it: what saves tensors for the
        backward would keep its own.

        Raises:
            UserCodeError: As `backward`.
        """
        contexts = {}
        for name, defense in self._defenses.items():
            if name in wanted and defense.weight and name not in self._found and self._may(defense):
                with self._as_used():
                    contexts[name] = defense.step_term_in_rows(batch, self.forward)
                self._ends.clear()
        with ExitStack() as stack:  # After all forwards that the others asked for.
            reading = {n: stack.enter_context(c) for n, c in contexts.items() if c is not None}
            yield lambda: sum(self._read(name, read) for name, read in reading.items())

    def _may(self, defense: Defense) -> bool:
        """Whether the rows' forward is the model as it will be used, and read for this class."""
        classes = type(defense).__mro__
        places = [
            next(i for i, one in enumerate(classes) if method in vars(one))
            for method in ("step_term_in_rows", "step_term")
        ]
        return places[0] <= places[1] and self._rows_will_do

    @cached_property
    def _rows_will_do(self) -> bool:
        return not self._changed and not _drops(self._model)

    def _read(self, name: str, read: Callable[[], Tensor]) -> Tensor:
        factor = self._defenses[name].weight * self._defenses[name].every_n_batches
        value = _checked(name, "step_term_in_rows", read(), factor)
        self._found[name] = value.detach()
        return factor * value

    def backward(self, factors: Mapping[str, float]) -> dict[str, float | None]:
        """Add the gradient of factor * term of each named defense to the parameters'.

        Of those that were read in the step's rows, it is there already.

        Returns:
            Each term's value.

        Raises:
            UserCodeError: `step_term` returned no scalar, or one without gradient.
        """
        values: dict[str, float | None] = {}
        due = [name for name in self._defenses if name in factors]
        for name in self._found.keys() & factors.keys():
            values[name] = float(self._found.pop(name))
            due.remove(name)
        if due:
            with self._as_used():  # Over the backward too, in which checkpointed layers run again.
                values |= {name: self._backward(name, factors[name]) for name in due}
        return values

    @contextmanager
    def _as_used(self) -> Iterator[None]:
        was_training = self._model.training
        with ExitStack() as stack:
            if self._compiled:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            self._model.eval()
            stack.callback(self._model.train, was_training)
            yield

    def _backward(self, name: str, factor: float) -> float:
        with torch.set_grad_enabled(factor != 0):
            value = _checked(
                name, "step_term", self._defenses[name].step_term(self.forward), factor
            )
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


def _checked(name: str, method: str, value: Any, factor: float) -> Tensor:
    if not isinstance(value, Tensor) or value.dim() != 0:
        what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else value
        raise UserCodeError(f"defenses.{name}: {method} must return a scalar, not {what}")
    check_gradient(name, method, value, factor)
    return value


def _drops(model: Any) -> bool:
    """Whether anything in the model is left out at random in training."""
    return any(
        (isinstance(module, nn.Dropout) and module.p) or getattr(module, "attn_dropout", 0.0)
        for module in model.modules()
    )
