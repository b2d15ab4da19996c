"""torch's Muon, which looks at its momentum between steps."""

from typing import Any

import torch
from torch.distributed.tensor import DTensor


class Watched(torch.optim.Muon):  # type: ignore[name-defined]
    """Ends a run whose momentum is not sharded as its parameter is, once a step is done."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter, state in self.state.items():
            for value in state.values():
                if isinstance(value, DTensor):
                    found: Any = parameter
                    assert value.placements == found.placements, "the momentum is not sharded"
        super().zero_grad(set_to_none)
