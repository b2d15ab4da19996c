"""Building a model whose weights are set afterwards, without drawing numbers for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.nn import init
from torch.overrides import TorchFunctionMode

# What torch's layers begin with.
_DRAWS = (init.kaiming_uniform_, init.normal_, init.uniform_)


class Undrawn(TorchFunctionMode):
    """A context in which torch's layers begin as zeros where they would draw.

    A checkpoint's weights take their place, and an adapter's. To draw them first takes a second for
    each 130M numbers. Zeros and not what is in memory by chance: DoRA's magnitudes are computed of
    the base plus B A before A has its values.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS:
            return init.zeros_(kwargs["tensor"] if "tensor" in kwargs else args[0])
        return func(*args, **kwargs)
