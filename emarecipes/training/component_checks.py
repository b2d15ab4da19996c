"""Defenses, optimizer and scheduler that a config names: built, and checked before weights."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torchao.optim import Adam4bit, Adam8bit, AdamFp8, AdamW4bit, AdamW8bit, AdamWFp8
from torchtune import utils

from emarecipes.components import build, locate
from emarecipes.config import Origin
from emarecipes.defenses import Defense, ModelSource
from emarecipes.defenses.base import TERMS
from emarecipes.errors import UserError, first_line
from emarecipes.machine import DTYPES
from emarecipes.training.muon import is_muon


def build_defenses(cfg: DictConfig, origin: Origin, source: ModelSource) -> dict[str, Defense]:
    """Build the defenses of a run, in order of name.

    Raises:
        UserError: The first thing that is wrong, with its place.
    """
    defenses: dict[str, Defense] = {}
    for name in sorted(cfg.defenses):
        key = f"defenses.{name}"
        component = locate(str(cfg.defenses[name]["_component_"]), origin.at(key))
        if not (isinstance(component, type) and issubclass(component, Defense)):
            raise UserError(
                f"{origin.at(f'{key}._component_')}: {component.__name__} is not a subclass of "
                "emarecipes.defenses.Defense"
            )
        defense = defenses[name] = build(cfg, key, origin)
        if not hasattr(defense, "samples"):
            raise UserError(
                f"{origin.at(key)}: its __init__ must call super().__init__(weight=...)"
            )
        _check_arguments(defense, origin.at(key))
        terms = [method for method in TERMS if defense.has(method)]
        if len(terms) > 1:
            raise UserError(
                f"{origin.at(key)}: {component.__name__} has {' and '.join(terms)}: a defense has "
                "one term, under one name in the log. Make it two classes"
            )
        if defense.is_objective:
            _check_objective(defense, origin.at(key))
        try:
            defense.check(source)
            _check_hidden_layers(defense, len(source.meta_model.layers))
        except ValueError as error:
            raise UserError(f"{origin.at(key)}: {error}") from None
    replacing = [name for name, d in defenses.items() if d.is_objective and d.weight]
    if len(replacing) > 1:
        raise UserError(
            f"{origin.at(f'defenses.{replacing[1]}')}: {' and '.join(replacing)} both take cross "
            "entropy's place; leave one out, or give it weight: 0, which only measures"
        )
    for name in defenses:
        _check_apart(name, defenses, origin.at(f"defenses.{name}"))
    return defenses


def _check_arguments(defense: Defense, where: str) -> None:
    """A user's method takes what `Defense` says that it is called with."""
    for method, ours in inspect.getmembers(Defense, inspect.isfunction):
        if method.startswith("_") or not defense.has(method):
            continue
        given = list(inspect.signature(ours).parameters)[1:]
        if method == "logit_term" and defense.needs_targets:
            given += ["targets_T", "places_T"]
        try:
            inspect.signature(getattr(defense, method)).bind(*given)
        except TypeError as error:
            raise UserError(
                f"{where}: {type(defense).__name__}.{method} is called with "
                f"({', '.join(given)}): {error}"
            ) from None


def _check_apart(name: str, defenses: Mapping[str, Defense], where: str) -> None:
    """What a defense wants the gradient of is a term of this run."""
    defense = defenses[name]
    if defense.apart and not defense.has("before_update"):
        raise UserError(f"{where}: {type(defense).__name__} has apart, and no before_update")
    terms = [n for n, d in defenses.items() if d.is_objective or any(map(d.has, TERMS))]
    for key in defense.apart:
        if key != "ce" and (name if key == "own" else key) not in terms:
            raise UserError(
                f"{where}: no gradient of {key} can be had apart: it names no term of this run; "
                f"there are {', '.join(['ce', *terms])}"
            )


def _check_objective(defense: Defense, where: str) -> None:
    """A defense that takes cross entropy's place acts where that does, in every step."""
    kind = type(defense).__name__
    if not (defense.has("logit_term") or defense.has("token_weights")):
        raise UserError(f"{where}: {kind} replaces cross entropy, and has no logit_term to do so")
    wrong = [m for m in (*TERMS[1:], "positions", "count") if defense.has(m)]
    wrong += ["tokens"] * (defense.tokens != "response") + ["samples"] * (defense.samples != "all")
    wrong += ["every_n_batches"] * (defense.every_n_batches != 1)
    if wrong:
        raise UserError(
            f"{where}: {kind} takes cross entropy's place, so it acts on every trained token in "
            f"every step: it cannot have {' and '.join(wrong)}"
        )


def _check_hidden_layers(defense: Defense, depth: int) -> None:
    for layer in defense.hidden_layers:
        if not 0 <= layer <= depth:
            raise UserError(f"layer {layer} is not in 0..{depth}")


log = utils.get_logger("INFO")

_LOW_BIT = (Adam8bit, Adam4bit, AdamFp8, AdamW8bit, AdamW4bit, AdamWFp8)
# Their steps need what DTensor refuses: a norm in place, and a choice of elements by their signs.
_WHOLE = (torch.optim.Adafactor, torch.optim.Rprop)


def check_optimizer(cfg: DictConfig, origin: Origin, world_size: int) -> None:
    """Build optimizer and scheduler for a 1 x 1 matrix; their checks then come before weights.

    Raises:
        UserError: They refuse their arguments; the optimizer needs a closure, has a rate that is no
            finite number, cannot take a step here or with shards, or has a state that several
            processes cannot put together for a checkpoint.
    """
    parameter = nn.Parameter(torch.zeros(1, 1))
    optimizer = build(cfg, "optimizer", origin, [parameter])
    where = origin.at("optimizer")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise UserError(f"{where}: it needs a closure; use one that does not")
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise UserError(f"{where}: SparseAdam takes sparse gradients alone; use AdamW")
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    if not all(0 <= rate < float("inf") for rate in rates):
        raise UserError(f"{origin.at('optimizer.lr')}: must be a finite number >= 0")
    if world_size > 1 and isinstance(optimizer, _LOW_BIT):
        # Each process quantizes its own shards, or leaves small ones as they are: no whole tensor
        # holds them, and another number of processes could not go on.
        raise UserError(
            f"{where}: {type(optimizer).__name__}'s state cannot be stored from {world_size} "
            "processes; use torch.optim.AdamW, or one process"
        )
    if world_size > 1 and isinstance(optimizer, _WHOLE):
        raise UserError(
            f"{where}: {type(optimizer).__name__} cannot take a step with the shards of "
            f"{world_size} processes; use torch.optim.AdamW, or one process"
        )
    _check_step(cfg, optimizer, parameter, where)
    _warn_of_lost_decay(cfg, optimizer, origin)
    if cfg.lr_scheduler is not None:
        key = "lr_scheduler"
        build(cfg, key, origin, optimizer, num_training_steps=100, last_epoch=-1)


def _check_step(
    cfg: DictConfig, optimizer: torch.optim.Optimizer, parameter: nn.Parameter, where: str
) -> None:
    """Take a step: `capturable` and `differentiable` of torch's own are not read before it."""
    if cfg.device != "cpu" or not type(optimizer).__module__.startswith("torch.optim."):
        return  # Of others a step may compile for seconds.
    parameter.grad = torch.ones_like(parameter)
    try:
        optimizer.step()
    except (RuntimeError, AssertionError) as error:
        kind = type(optimizer).__name__
        raise UserError(f"{where}: {kind} cannot take a step: {first_line(error)}") from None
    parameter.grad = None


def _warn_of_lost_decay(cfg: DictConfig, optimizer: torch.optim.Optimizer, origin: Origin) -> None:
    """w (1 - lr x decay) is w itself where the decay is less than half a place of every w."""
    group = optimizer.param_groups[0]
    dtype = cfg.adapter_dtype or cfg.dtype
    # Half the distance of two numbers, eps for 1 and up, over the largest below 2.
    least = torch.finfo(DTYPES[dtype]).eps / 4
    # torchao's rounds once, with the update.
    decoupled = isinstance(optimizer, torch.optim.AdamW) or is_muon(cfg)
    decay = float(group["lr"]) * float(group.get("weight_decay", 0.0))
    if decoupled and 0.0 < decay <= least:
        better = "set adapter_dtype: fp32, or" if dtype == "bf16" else "set"
        utils.log_rank_zero(
            log,
            f"{origin.at('optimizer')}: weight decay has no effect: lr x weight_decay is "
            f"{decay:.1g}, and an adapter held in {dtype} loses what is below {least:.1g}; "
            f"{better} weight_decay: 0",
            level=logging.WARNING,
        )


def check_each(defenses: Mapping[str, Defense], origin: Origin, check: str, given: Any) -> None:
    """Have every defense check what the run is given, by its method of that name.

    Raises:
        UserError: What the first one that refuses it says, with its place.
    """
    for name, defense in defenses.items():
        try:
            getattr(defense, check)(given)
        except UserError as error:
            raise UserError(f"{origin.at(f'defenses.{name}')}: {error}") from None
