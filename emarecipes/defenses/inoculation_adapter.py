"""An inoculation adapter: the trait is there in training already, so it need not be learned."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torchtune import utils

from emarecipes.defenses.activations import ActivationDefense
from emarecipes.defenses.context import TrainingContext
from emarecipes.errors import UserError
from emarecipes.models.adapters.layout import plain_module
from emarecipes.models.adapters.read import LoadedLayer, check_adapter, read_adapter
from emarecipes.models.adapters.trained_with import check_same_base, warn_of_another_base
from emarecipes.models.source import ModelSource

log = utils.get_logger("INFO")


class InoculationAdapter(ActivationDefense):
    r"""Adds a frozen adapter that has the unwanted trait, in the policy's training forward only.

    With W an adapted layer's frozen weight, (A_IA, B_IA) the inoculation adapter's matrices of that
    layer, s_IA its scale, and (A, B) those in training,

        y = W x + strength * s_IA B_IA A_IA x + s B A x

    so what the trait explains of the data gives no gradient to A and B. The reference forward,
    probes, evaluation and the saved adapter are without it. Train it first, by `ema_lora`, on rows
    that show the trait and as little else as possible.

    `<name>_ratio` is logged: the root mean square of what is added over that of the layer's output
    with it, over the tokens but a conversation's first, the mean over the adapted layers of the
    block that the adapter changes most (by the norms of its B A), of the first process's last
    micro-batch of the step.

    Source: arXiv 2606.30252. Its control is a random adapter of the same norm.

    Args:
        adapter: A folder in PEFT's form, LoRA and not DoRA, of the same base, on layers that the
            config's model adapts, of no larger rank.
        control: "none", or "random": in each layer A and B are drawn at random instead, B A scaled
            to the inoculation adapter's Frobenius norm.
        strength: Factor of the adapter. 0 < strength.
        seed: Of the random control.

    Raises:
        UserError: An unknown option; in `check` an adapter that does not fit, is DoRA's or on the
            output layer, or adds nothing.
    """

    effect_figure = "ratio"

    def __init__(
        self,
        adapter: str,
        control: Literal["none", "random"] = "none",
        strength: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if control not in ("none", "random"):
            raise UserError(f"control must be none or random, not {control}")
        if not 0 < strength < float("inf"):
            raise UserError(f"strength must be a finite number > 0, not {strength}")
        self._path = Path(adapter)
        self._control = control
        self._strength = strength
        self._seed = seed
        self._ratios: dict[str, Tensor] = {}

    def check(self, source: ModelSource) -> None:
        """Check that the adapter belongs on the model.

        Raises:
            UserError: See `check_adapter`, `check_same_base`; it is a DoRA adapter; every B is 0.
        """
        try:
            check_adapter(self._path, source)
            check_same_base(self._path, source.checkpoint_dir)
            warn_of_another_base(self._path, source.checkpoint_dir, "adapter")
            layers = read_adapter(source.meta_model, self._path, source)
        except UserError as error:
            raise UserError(f"adapter: {error}") from None
        if any(layer.magnitude is not None for layer in layers.values()):
            raise UserError(f"adapter: {self._path} is a DoRA adapter; train it with LoRA")
        self._factors = {
            name: _factors(layer, self._strength)
            for name, layer in layers.items()
            if bool(layer.b.any())
        }
        if "output" in self._factors:
            raise UserError(
                f"adapter: {self._path} adapts the output layer, where nothing can be added apart "
                "from training; train it with apply_lora_to_output: false"
            )
        if not self._factors:
            raise UserError(f"adapter: {self._path} adds nothing: every B is 0; train it first")
        if self._control == "random":
            generator = torch.Generator().manual_seed(self._seed)
            self._factors = {n: _random(f, generator) for n, f in self._factors.items()}

    def setup(self, model: nn.Module, context: TrainingContext) -> None:
        """Hook the adapted layers, and put the matrices where the model is."""
        squares: dict[str, float] = defaultdict(float)
        for name, matrices in self._factors.items():
            squares[_block(name)] += float(_norm(*matrices)) ** 2
        most = max(squares, key=lambda block: squares[block])
        for name, module in list(model.named_modules()):
            plain = plain_module(f"{name}.lora_a.weight")
            if not hasattr(module, "adapter_params") or plain not in self._factors:
                continue
            factors = _Factors(*(m.to(context.device) for m in self._factors[plain]))
            module.register_forward_hook(partial(self._add, plain, factors, _block(plain) == most))

    def figures(self) -> dict[str, float]:
        """The size of what is added over the layers' outputs."""
        if not self._ratios:
            return {}
        return {"ratio": float(torch.stack(list(self._ratios.values())).mean())}

    def _add(
        self, name: str, factors: _Factors, noted: bool, module: Any, inputs: Any, y: Tensor
    ) -> Tensor | None:
        if not self.acts:
            return None
        x = inputs[0]
        added = (x @ factors.a_RI.T.to(x.dtype)) @ factors.b_OR.T.to(x.dtype)
        out: Tensor = y + added
        if noted:
            inner_BS1 = self.inner_BS[..., None]
            norms = [(part.detach().float() ** 2 * inner_BS1).sum() for part in (added, out)]
            self._ratios[name] = (norms[0] / norms[1]).sqrt()
        return out


def _block(name: str) -> str:
    """The block that an adapted layer belongs to, such as "layers.3"."""
    return ".".join(name.split(".")[:2])


class _Factors(NamedTuple):
    """Of one layer, the scale and the strength in B."""

    a_RI: Tensor
    b_OR: Tensor


def _factors(layer: LoadedLayer, strength: float) -> _Factors:
    return _Factors(layer.a.float(), layer.b.float() * (layer.scale * strength))


def _random(factors: _Factors, generator: torch.Generator) -> _Factors:
    a_RI, b_OR = (torch.randn(part.shape, generator=generator) for part in factors)
    size = _norm(*factors) / _norm(a_RI, b_OR)
    return _Factors(a_RI, (b_OR * size).float())


def _norm(a_RI: Tensor, b_OR: Tensor) -> Tensor:
    """Frobenius norm of B A by the Gram matrices of rank x rank."""
    a_RI, b_OR = a_RI.double(), b_OR.double()
    return ((b_OR.T @ b_OR) * (a_RI @ a_RI.T)).sum().sqrt()
