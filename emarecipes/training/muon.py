"""Muon, which orthogonalises whole matrices: what it takes, and its step over shards of them."""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import DictConfig
from torch.distributed.tensor import DTensor, Replicate
from torchtune.config import instantiate

from emarecipes.components import locate
from emarecipes.config import Origin
from emarecipes.errors import UserError


def is_muon(cfg: DictConfig) -> bool:
    """Whether a config's optimizer is torch's Muon, or a subclass."""
    muon = getattr(torch.optim, "Muon", None)  # From torch 2.9 on.
    found = locate(str(cfg.optimizer["_component_"]), "optimizer")
    return muon is not None and isinstance(found, type) and issubclass(found, muon)


def check_muon(cfg: DictConfig, origin: Origin, model: Any, world_size: int) -> None:
    """Check a config whose optimizer is Muon.

    Args:
        cfg: The run's.
        origin: For messages.
        model: Built on the meta device.
        world_size: Number of processes.

    Raises:
        UserError: A trained parameter is no matrix; its momentum would be lost (see
            `loses_momentum`); its shards are in the host's memory.
    """
    where = origin.at("optimizer")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dim() != 2:
            shape = "x".join(map(str, parameter.shape))
            hint = "leave model.use_dora out" if name.endswith("magnitude") else "train matrices"
            raise UserError(
                f"{where}: Muon is for matrices, and {name} ({shape}) is none: {hint}, or take "
                "torch.optim.AdamW"
            )
    held_in = cfg.adapter_dtype or cfg.dtype
    if held_in == "bf16" and cfg.optimizer.get("nesterov") is False and loses_momentum():
        raise UserError(
            f"{where}: with nesterov: false the Muon of torch {torch.__version__} overwrites the "
            "momentum of an adapter that is held in bf16; set adapter_dtype: fp32, leave nesterov "
            "out, or install torch 2.15"
        )
    if world_size > 1 and cfg.fsdp_cpu_offload:
        raise UserError(
            f"{where}: Muon needs whole matrices on the device; leave fsdp_cpu_offload out"
        )


def loses_momentum() -> bool:
    """Whether torch's Muon normalises its momentum in place where that is bf16 without nesterov.

    torch 2.9 to 2.14 do, 2.15 does not.
    """
    return torch.__version__ < "2.15"  # Compared as versions: it is a TorchVersion.


def build_muon(cfg: DictConfig, model: Any) -> torch.optim.Optimizer:
    """The config's Muon over the trained parameters alone: frozen ones need be no matrices.

    Under FSDP2 gradient and momentum are whole on every process while a step is taken, as
    orthogonalising is no matter of rows: each computes the same bits that one process would, and
    changes its own shard. Left to their shards, torch's products of these are right too, but in
    bf16 they round otherwise, and each is communication of its own. Between steps the momentum is
    sharded as the parameter is.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: torch.optim.Optimizer = instantiate(cfg.optimizer, trained)
    optimizer.register_step_pre_hook(_gather)
    optimizer.register_step_post_hook(_shard)
    return optimizer


def _gather(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for parameter in _sharded(optimizer):
        whole = [Replicate()] * parameter.device_mesh.ndim
        gradient = parameter.grad
        assert isinstance(gradient, DTensor)
        parameter.grad = gradient.redistribute(placements=whole)
        _place(optimizer, parameter, whole)


def _shard(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for parameter in _sharded(optimizer):
        _place(optimizer, parameter, parameter.placements)


def _sharded(optimizer: torch.optim.Optimizer) -> list[DTensor]:
    """Those that the step changes."""
    every = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [p for p in every if isinstance(p, DTensor) and p.grad is not None]


def _place(optimizer: torch.optim.Optimizer, parameter: DTensor, placements: Any) -> None:
    state = optimizer.state[parameter]
    for key, value in state.items():
        if isinstance(value, DTensor):
            state[key] = value.redistribute(placements=placements)
