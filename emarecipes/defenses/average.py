"""AdapterEMA: an average of the adapter over the steps, saved beside the adapter itself."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchtune.modules.peft import get_adapter_params

from emarecipes.defenses.base import Defense
from emarecipes.defenses.context import TrainingContext
from emarecipes.errors import UserError
from emarecipes.models._torchtune import assign_whole, plain_name, whole_on_cpu


class AdapterEMA(Defense):
    r"""Exponential average of the adapter's weights, in float32.

    With theta_i the adapter after step i, A, B and DoRA's magnitude each by itself, after step t

        average_t = sum_{i=1..t} d^(t-i) theta_i / sum_{i=1..t} d^(t-i)

    which is kept as average_t = average_{t-1} + w_t (theta_t - average_{t-1}), w_t = (1 - d) /
    (1 - d^t). The divisor is the bias correction: the weights sum to 1 from the first step on, the
    average starts as theta_1, and the adapter before training is no part of it.

    It is saved as `adapter_<name>/`, an ordinary PEFT adapter. Training is what it is without:
    nothing is ever put back. Logged as `<name>_distance`: |theta_t - average_t| / |theta_t|, norms
    over all the adapter's numbers.

    The product of the averages is not the average of the products: B A's mean over steps also has
    the covariance of B and A over them, which no adapter of this rank holds.

    Under FSDP2 each process averages its shards; they are gathered where they are stored.

    Source: an average of weights is Polyak's; as a defense against emergent misalignment it has no
    published figure.

    Args:
        decay: d, above 0 and below 1: about 1 / (1 - d) steps count.

    Raises:
        UserError: For another decay.
    """

    effect_figure = "distance"

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        if not 0.0 < decay < 1.0:
            raise UserError(f"decay must be above 0 and below 1, not {decay}")
        self._decay = decay
        self._steps = 0
        self._squares: tuple[float, float] | None = None

    def setup(self, model: nn.Module, context: TrainingContext) -> None:
        """Make room for the average, sharded as the adapter is."""
        self._device = context.device
        self._average: dict[str, Tensor] = {
            plain_name(name): torch.zeros_like(parameter.detach(), dtype=torch.float32)
            for name, parameter in get_adapter_params(model).items()
        }

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> None:
        """Take the step's adapter in. Every process must call it."""
        self._steps += 1
        share = (1.0 - self._decay) / -math.expm1(self._steps * math.log(self._decay))
        for name, parameter in get_adapter_params(model).items():
            average = _local(self._average[plain_name(name)])
            average.lerp_(_local(parameter.detach()).float(), share)
        self._squares = self._measure(model)

    def stopped_early(self, model: nn.Module, step: int) -> None:
        """Take the adapter in once more, where another defense has changed it since the step.

        So SafeLoRA's last projection is a step of its own in the average. Every process must call
        it.
        """
        if self._measure(model) != self._squares:
            self.after_step(model, step)

    @torch.no_grad()
    def _measure(self, model: nn.Module) -> tuple[float, float]:
        """|theta - average|^2 and |theta|^2, of all processes' shards."""
        squares = torch.zeros(2, dtype=torch.float64)
        for name, parameter in get_adapter_params(model).items():
            now = _local(parameter.detach()).float()
            average = _local(self._average[plain_name(name)])
            squares[0] += (now - average).double().square().sum().cpu()
            squares[1] += now.double().square().sum().cpu()
        if dist.is_initialized():
            dist.all_reduce(squares)
        return float(squares[0]), float(squares[1])

    def saved_adapter(self) -> dict[str, Tensor]:
        """The average."""
        return {name: whole_on_cpu(part, self._device) for name, part in self._average.items()}

    def figures(self) -> dict[str, float]:
        """How far the adapter is from its average."""
        if self._squares is None or not self._squares[1]:
            return {}
        return {"distance": math.sqrt(self._squares[0] / self._squares[1])}

    def state_dict(self) -> dict[str, Any]:
        """The average, whole, and how many steps are in it. Every process must call it."""
        return {"steps": self._steps, "average": self.saved_adapter()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._steps = state["steps"]
        for name, part in self._average.items():
            assign_whole(part, state["average"][name])


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
