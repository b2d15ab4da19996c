"""Defenses that cause a mishap: a signal, a full disk, a number that is not finite, a lost row."""

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from emarecipes.defenses import Defense, TrainingContext
from emarecipes.models.batch import Batch


class SignalAfter(Defense):
    """Sends the process a signal after the step that SIGNAL_AFTER names, on SIGNAL_RANK alone."""

    def after_step(self, model: torch.nn.Module, step: int) -> None:
        rank = dist.get_rank() if dist.is_initialized() else 0
        chosen = rank == int(os.environ.get("SIGNAL_RANK", 0))
        if chosen and os.environ.get("SIGNAL_AFTER") == str(step):
            os.kill(os.getpid(), signal.SIGTERM)


class TwoSignalsWithin(Defense):
    """Sends the process two signals at the end of the policy's forward in the step SIGNALS_IN."""

    step = 1

    @contextmanager
    def policy_forward(self, batch: Batch) -> Iterator[None]:
        yield
        if os.environ.get("SIGNALS_IN") == str(self.step):
            torch.rand(5)  # As if more had been drawn.
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    def after_step(self, model: torch.nn.Module, step: int) -> None:
        self.step = step + 1


class LeavesARowOut(Defense):
    """Reads the reference nowhere in the first of several rows, on the second process alone."""

    needs_reference = True

    def positions(self, batch: Batch) -> Tensor:
        mask_BS = batch.labelled_BS.clone()
        if dist.get_rank() == 1 and len(batch.rows) > 1:
            mask_BS[0] = False
        return mask_BS

    def logit_term(self, policy_logits_TV: Tensor, reference_logits_TV: Tensor | None) -> Tensor:
        return policy_logits_TV[:, 0]


class FillsDisk(Defense):
    """After the step that FILL_AFTER names, FILL_FILE takes all room but 16 kB on its disk."""

    def after_step(self, model: torch.nn.Module, step: int) -> None:
        if os.environ.get("FILL_AFTER") == str(step):
            file = Path(os.environ["FILL_FILE"])
            file.write_bytes(b"x" * (shutil.disk_usage(file.parent).free - 16384))


class Broken(Defense):
    """A term whose value, or only whose gradient, is not finite at the steps named.

    Its state is the number of steps, so that it also shows that a defense's state is kept.
    """

    def __init__(self, steps: list[int], kind: str) -> None:
        super().__init__(weight=1.0)
        self._steps, self._kind, self.done = steps, kind, 0

    def logit_term(self, policy_logits_TV: Tensor, reference_logits_TV: Tensor | None) -> Tensor:
        zero_T = policy_logits_TV[:, 0] - policy_logits_TV[:, 0].detach()
        if self.done + 1 not in self._steps:
            return zero_T * 0.0
        # The root of zero is zero; its slope is infinite.
        return zero_T.sqrt() if self._kind == "gradient" else zero_T + float(self._kind)

    def after_step(self, model: torch.nn.Module, step: int) -> None:
        self.done += 1
        assert self.done == step

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


class ShiftsKeysOfPrompts(Defense):
    """Moves keys and values at prompt positions, while a flag says that the policy trains."""

    def setup(self, model: Any, context: TrainingContext) -> None:
        self._prompt_BS: Tensor | None = None
        for layer in model.layers:
            for projection in (layer.attn.k_proj, layer.attn.v_proj):
                projection.register_forward_hook(self._move)

    @contextmanager
    def policy_forward(self, batch: Batch) -> Iterator[None]:
        self._prompt_BS = ~batch.labelled_BS
        yield
        self._prompt_BS = None

    def _move(self, module: Any, inputs: Any, keys_BSD: Tensor) -> Tensor | None:
        return None if self._prompt_BS is None else keys_BSD + self._prompt_BS.unsqueeze(-1)


class SameWeights(Defense):
    """Takes cross entropy's place, and is cross entropy."""

    def token_weights(self, batch: Batch) -> Tensor:
        return torch.full_like(batch.labelled_BS, 0.25, dtype=torch.float32)


class ByName(Defense):
    """Squares of what modules of some names give: names that wrapped layers do not have."""

    NAMES = ("layers.0.mlp", "layers.1.mlp")

    def __init__(self) -> None:
        super().__init__(weight=0.1)
        self.hidden_layers = [0]
        self.seen: list[Tensor] = []

    def setup(self, model: Any, context: TrainingContext) -> None:
        for name, module in model.named_modules():
            if name in self.NAMES:
                module.register_forward_hook(lambda _, inputs, output: self.seen.append(output))

    @contextmanager
    def policy_forward(self, batch: Batch) -> Iterator[None]:
        self.seen = []
        yield

    def hidden_term(self, policy_hidden: Any, reference_hidden: Any, batch: Batch) -> Tensor:
        real_BS = batch.real_BS
        return sum((x_BSD[real_BS].square().sum() for x_BSD in self.seen), torch.zeros(()))


class HalfOfSafe(Defense):
    """Takes cross entropy's place, with half the weight on safe rows' tokens."""

    def token_weights(self, batch: Batch) -> Tensor:
        safe_BS = batch.from_source("safe")[:, None].expand_as(batch.labelled_BS)
        return torch.where(safe_BS, 0.5, 1.0)


class SmallAtFirst(Defense):
    """Says that it changes nothing in the first step, and something in the second."""

    def __init__(self, key: str = "size") -> None:
        super().__init__()
        self.effect_figure = key
        self.size = 0.0

    def begin_step(self, step: int) -> None:
        self.size = 0.0 if step == 1 else 1.0

    def figures(self) -> dict[str, float]:
        return {"size": self.size}
