"""What makes training go on as if it had not stopped: collected from all processes, put back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torchtune import utils
from torchtune.modules.peft import get_adapter_params

from emarecipes.defenses import Defense
from emarecipes.errors import UserError
from emarecipes.models._torchtune import adapter_state, assign_whole, plain_name
from emarecipes.training.checkpoint import Checkpoint
from emarecipes.training.random_state import random_state, set_random_state

log = utils.get_logger("INFO")


class TrainingState:
    """Everything that a training step reads and changes.

    Stored tensors are whole, whatever the number of processes, so that another number can go on.

    Args:
        model: With its adapter; may be sharded by FSDP2.
        optimizer: The adapter's.
        scheduler: The learning rate's, if any.
        defenses: By name.
        device: This process's.
    """

    def __init__(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        defenses: Mapping[str, Defense],
        device: torch.device,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._defenses = defenses
        self._device = device

    def adapter(self) -> dict[str, Tensor]:
        """The adapter's whole tensors on the CPU. Every process must call it.

        Raises:
            UserError: A value is not finite.
        """
        adapter = adapter_state(self._model, self._device)
        broken = [name for name, tensor in adapter.items() if not tensor.isfinite().all()]
        if broken:
            raise UserError(
                f"the last step left values in the adapter that are not finite ({broken[0]}); "
                "it is not saved. Lower the learning rate"
            )
        return adapter

    def training(self) -> dict[str, Any]:
        """All the rest. Every process must call it.

        A defense's state is the first process's.
        """
        optimizer = self._optimizer.state_dict()
        optimizer["state"] = {
            index: {key: self._whole(value) for key, value in state.items()}
            for index, state in optimizer["state"].items()
        }
        return {
            "optimizer": optimizer,
            "scheduler": None if self._scheduler is None else self._scheduler.state_dict(),
            "defenses": {name: d.state_dict() for name, d in self._defenses.items()},
            "random": _from_all(random_state(self._device)),
        }

    def load(self, checkpoint: Checkpoint) -> None:
        """Put back what a checkpoint holds. Every process must call it, before the first step."""
        adapter = checkpoint.adapter()
        for name, parameter in get_adapter_params(self._model).items():
            assign_whole(parameter, adapter[plain_name(name)])
        stored = checkpoint.training()
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        for index, state in stored["optimizer"]["state"].items():
            for key, value in state.items():
                state[key] = _like(parameters[index], value)
        self._optimizer.load_state_dict(stored["optimizer"])
        if self._scheduler is not None:
            self._scheduler.load_state_dict(stored["scheduler"])
        for name, defense in self._defenses.items():
            defense.load_state_dict(stored["defenses"][name])
        _, rank = utils.get_world_size_and_rank()
        if rank < len(stored["random"]):
            set_random_state(stored["random"][rank], self._device)
        else:
            log.info("More processes than before: the new ones draw their own random numbers")

    def _whole(self, value: Any) -> Any:
        if isinstance(value, DTensor):
            # Offloaded shards are gathered on the device.
            value = cast(DTensor, value.to(self._device)).full_tensor()
        return value.cpu() if isinstance(value, Tensor) else value


def _like(parameter: Tensor, value: Any) -> Any:
    """An optimizer's value for this parameter, sharded as the parameter is."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor):
        return value
    if value.shape != parameter.shape:  # A count, the same on every process.
        return value
    mesh = parameter.device_mesh
    return distribute_tensor(value.to(mesh.device_type), mesh, parameter.placements)


def _from_all(value: Any) -> list[Any]:
    """Every process's value, by rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
