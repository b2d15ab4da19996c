"""torchtune's layers in fewer passes over memory: on a CPU these passes cost what they move.

Beside its matrix products, a float32 step on a CPU spends its time on element-wise operations and
on fresh pages for their results. The layers here compute what torchtune's do with fewer of both.
Parameters and their names stay; results differ by rounding.

Shapes: T tokens, I inputs, O outputs, R rank, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.modules import RMSNorm, RotaryPositionalEmbeddings
from torchtune.modules.peft import LoRALinear

from emarecipes.models.families.blocks import HalfRotation


def with_fewer_passes(model: nn.Module) -> None:
    """Exchange the forward of a float32 model's plain layers, in place; the model may be sharded.

    DoRA, quantized bases, dropout on the adapter, trained norms and families with norms or rotary
    positions of their own keep torchtune's.
    """
    for module in model.modules():
        kind = _FASTER.get(type(module))
        if kind is not None and kind.fits(module):
            module.__class__ = kind


class _FusedLoRALinear(LoRALinear):
    """Scales and adds the adapter's part inside its product, and so for the input's gradient."""

    @staticmethod
    def fits(module: Any) -> bool:
        frozen = not module.weight.requires_grad and not module.use_bias
        return frozen and not module._quantize_base and isinstance(module.dropout, nn.Identity)

    def forward(self, x: Tensor) -> Tensor:
        if self.disabled:
            return F.linear(x, self.weight)
        a_RI, b_OR, scale = self.lora_a.weight, self.lora_b.weight, self.alpha / self.rank
        y_TO: Tensor = _LoRA.apply(x.flatten(0, -2), self.weight, a_RI, b_OR, scale)
        shaped: Tensor = y_TO.unflatten(0, x.shape[:-1])
        return shaped


class _LoRA(torch.autograd.Function):
    """y = x W^T + scale (x A^T) B^T with W frozen."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, w_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float
    ) -> Tensor:
        low_TR = x_TI @ a_RI.T
        ctx.save_for_backward(x_TI, w_OI, a_RI, b_OR, low_TR)
        ctx.scale = scale
        return (x_TI @ w_OI.T).addmm_(low_TR, b_OR.T, alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        x_TI, w_OI, a_RI, b_OR, low_TR = ctx.saved_tensors
        (y_TO,) = gradients
        grad_low_TR = (y_TO @ b_OR).mul_(ctx.scale)
        grad_x_TI = None
        if ctx.needs_input_grad[0]:
            grad_x_TI = (y_TO @ w_OI).addmm_(grad_low_TR, a_RI)
        if not ctx.needs_input_grad[2]:  # Frozen, as its B is.
            return grad_x_TI, None, None, None, None
        return grad_x_TI, None, grad_low_TR.T @ x_TI, (y_TO.T @ low_TR).mul_(ctx.scale), None


class _FusedRMSNorm(RMSNorm):
    """Takes the gradient in four passes, where autograd's of the composed operation has a dozen."""

    @staticmethod
    def fits(module: Any) -> bool:
        return not module.scale.requires_grad

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Norm.apply(x, self.scale, self.eps)
        return y


class _Norm(torch.autograd.Function):
    """y = x r w with r = (mean x^2 + eps)^(-1/2), of the last dimension; w frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_D: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, w_D)
        ctx.eps = eps
        return F.rms_norm(x, w_D.shape, w_D, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        # dx = r (g - x r^2 mean(g x)) with g = w dy.
        x, w_D = ctx.saved_tensors
        g = gradients[0] * w_D
        r = (torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(ctx.eps)).rsqrt_().unsqueeze(-1)
        share = torch.linalg.vecdot(g, x).unsqueeze(-1) * r.square() / x.shape[-1]
        return g.addcmul_(x, share, value=-1).mul_(r), None, None


class _ComplexRotation(nn.Module):
    """Rotates pairs as complex numbers, in one pass and not six over every second element."""

    cache: Tensor

    @staticmethod
    def fits(module: Any) -> bool:
        return True

    def forward(self, x: Tensor, *, input_pos: Tensor | None = None) -> Tensor:
        table = self.cache[: x.shape[1]] if input_pos is None else self.cache[input_pos]
        # (S, D/2) or (B, S, D/2), and x (B, S, heads, D/2).
        turns = torch.view_as_complex(table).unsqueeze(-2)
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turns).flatten(-2)


class _PlainRotation(_ComplexRotation, RotaryPositionalEmbeddings):
    pass


class _ScaledRotation(_ComplexRotation, Llama3ScaledRoPE):
    pass


class _HalfRotation(HalfRotation):
    """Turns in two passes and no copies of halves, in the backward likewise; a quarter the time."""

    @staticmethod
    def fits(module: Any) -> bool:
        return True

    def forward(self, x: Tensor, *, input_pos: Tensor | None = None) -> Tensor:
        table = self.cache[: x.shape[1]] if input_pos is None else self.cache[input_pos]
        turned: Tensor = _Turn.apply(x, *table.unsqueeze(-2).chunk(2, dim=-1))
        return turned


class _Turn(torch.autograd.Function):
    """(x, y) to (x cos - y sin, y cos + x sin), whose transpose turns back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        cos, sin = ctx.saved_tensors
        return _turned(gradients[0], cos, sin, -1.0), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    pairs = cos.shape[-1]
    still = cos.new_ones(*cos.shape[:-1], x.shape[-1] - 2 * pairs)
    result = x * torch.cat([cos, cos, still], dim=-1)
    one, other = slice(pairs), slice(pairs, 2 * pairs)
    result[..., one].addcmul_(x[..., other], sin, value=-sign)
    result[..., other].addcmul_(x[..., one], sin, value=sign)
    return result


_FASTER: dict[type, Any] = {
    LoRALinear: _FusedLoRALinear,
    RMSNorm: _FusedRMSNorm,
    RotaryPositionalEmbeddings: _PlainRotation,
    Llama3ScaledRoPE: _ScaledRotation,
    HalfRotation: _HalfRotation,
}
