"""What the loss head is asked for: terms, the positions they act on, and what weighs them.

Shapes: B batch, S sequence, T selected positions, C chunk of them, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

LogitTerm = Callable[[Tensor, Tensor | None, Tensor, Tensor | None], Tensor]


@dataclass
class Term:
    """One term of the loss that is computed from logits.

    Attributes:
        name: Its key in the log.
        compute: (policy (C, V), reference (C, V) or None, targets (C,), places (C,) or None) ->
            values (C,), from log-probabilities in float32.
        positions_BS: The positions it acts on.
        scale: Its factor in the loss: weight over the number of positions in the whole step.
        needs_reference: Whether it reads the reference's logits.
        at_targets: Whether of these it is given the targets' log-probabilities alone, (C,).
        weights_BS: What each position's value is multiplied by; None: 1.
    """

    name: str
    compute: LogitTerm
    positions_BS: Tensor
    scale: float
    needs_reference: bool = False
    at_targets: bool = False
    weights_BS: Tensor | None = None


@dataclass
class Request:
    """What the next forward is to compute: the terms, or the reference's hidden states for them.

    Targets and their places in the answer, from 1, are what the terms' `compute` is given.
    `reference_TD` is the reference's normed hidden states; with `at_targets`, which is for terms
    that read no more, its log-probabilities of the targets, (T, 1).
    """

    terms: list[Term]
    targets_BS: Tensor
    reference_TD: Tensor | None = None
    places_BS: Tensor | None = None
    at_targets: bool = False
    sums: Tensor = field(init=False)

    def __post_init__(self) -> None:
        # Sum of each term's values over this micro-batch, for the log.
        self.sums = torch.zeros(len(self.terms), dtype=torch.float64, device=self.targets_BS.device)
        self.selected_BS = torch.stack([term.positions_BS for term in self.terms]).any(dim=0)
