"""What one layer and one chunk of the loss head hold and compute, run on the meta device.

The operators run for shapes alone, and every storage that they make is counted while it lives. So
what autograd keeps for the backward is found, not assumed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

_aten = torch.ops.aten


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    flops: int = sdpa_flop_count(query, key, value)
    return flops


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    flops: int = sdpa_backward_flop_count(grad, query, key, value)
    return flops


# Not among those that PyTorch counts by itself.
_FLOPS = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


@dataclass(frozen=True)
class Trace:
    """Bytes and floating-point operations of a forward and its backward.

    Attributes:
        kept: Held between them, results included.
        forward_peak: The most that was held in the forward.
        backward_peak: The most in the backward, what the forward kept included.
        forward_flops: Of matrix products and attention; a multiplication and an addition are two.
        backward_flops: Likewise.
    """

    kept: int
    forward_peak: int
    backward_peak: int
    forward_flops: int
    backward_flops: int


def trace(forward: Callable[[], Tensor], *, backward: bool = True) -> Trace:
    """Run `forward` on meta tensors, and the backward of what it returns."""
    with MemoryCounter() as memory, _FlashAttention():
        with torch.set_grad_enabled(backward):
            output = forward()
        kept, forward_peak = memory.live, memory.take_peak()
        if backward:
            output.backward(torch.empty_like(output))
        backward_peak = memory.take_peak()
    del output
    # Apart, as the counter holds on to tensors.
    with FlopCounterMode(display=False, custom_mapping=_FLOPS) as flops, _FlashAttention():
        with torch.set_grad_enabled(backward):
            output = forward()
        forward_flops = flops.get_total_flops()
        if backward:
            output.backward(torch.empty_like(output))
        backward_flops = flops.get_total_flops() - forward_flops
    return Trace(kept, forward_peak, backward_peak, forward_flops, backward_flops)


class MemoryCounter(TorchDispatchMode):
    """Counts the bytes of the tensors that operators make in it, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self._peak = 0
        self._known: set[int] = set()

    def take_peak(self) -> int:
        """The largest `live` since the last call."""
        peak, self._peak = self._peak, self.live
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What was there before, such as weights: their views are not new.
        tree_map_only(Tensor, self._note_outside, (args, kwargs))
        output = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._note, output)
        return output

    def _note_outside(self, tensor: Tensor) -> Tensor:
        self._known.add(tensor.untyped_storage()._cdata)
        return tensor

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        identity, size = storage._cdata, storage.nbytes()
        if identity not in self._known:  # Else a view, or changed in place.
            self._known.add(identity)
            self.live += size
            self._peak = max(self._peak, self.live)
            weakref.finalize(storage, self._forget, identity, size)
        return tensor

    def _forget(self, identity: int, size: int) -> None:
        self._known.discard(identity)
        self.live -= size


class _FlashAttention(TorchFunctionMode):
    """Attention as devices compute it, where the meta device would hold all scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        kwargs = {k: v for k, v in kwargs.items() if k in ("dropout_p", "is_causal")}
        return _aten._scaled_dot_product_flash_attention_for_cpu(*args[:3], **kwargs)[0]
