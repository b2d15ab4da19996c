"""Which terms a micro-batch's logits are asked for: cross entropy, what replaces it, the others.

Shapes: B batch, S sequence, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from emarecipes.defenses import Defense
from emarecipes.errors import UserCodeError
from emarecipes.models.batch import Batch
from emarecipes.models.loss_head import cross_entropy
from emarecipes.models.loss_terms import LogitTerm, Term


class LogitTerms:
    """The terms on logits of a run.

    Args:
        defenses: All of the run's, in order of name.
        ce_weights: Of each cross entropy: `ce` alone, or `ce_task` and `ce_safe`.
    """

    def __init__(self, defenses: Mapping[str, Defense], ce_weights: Mapping[str, float]) -> None:
        self.defenses = {n: d for n, d in defenses.items() if d.has("logit_term") or d.is_objective}
        self._ce_weights = ce_weights

    @property
    def replacing(self) -> str | None:
        """The defense that takes cross entropy's place, if one does: at weight 0 it measures."""
        return next((n for n, d in self.defenses.items() if d.is_objective and d.weight), None)

    def of(self, batch: Batch, scales: Sequence[float]) -> list[Term]:
        """Cross entropy's terms and the defenses', with these factors in the loss."""
        terms = [
            Term(name, cross_entropy, labelled(batch, name), scale)
            for name, scale in zip(self._ce_weights, scales, strict=False)
        ]
        rest = scales[len(terms) :]
        for (name, defense), scale in zip(self.defenses.items(), rest, strict=False):
            weights_BS = self._weights(name, batch) if defense.is_objective else None
            term = Term(
                name,
                values_of(defense),
                defense.positions(batch),
                scale,
                defense.needs_reference,
                defense.reads_reference_at_targets,
                weights_BS,
            )
            terms.append(term)
        return terms

    def count(self, name: str, batch: Batch) -> Tensor:
        """Scalar: what a defense's sum over this batch is divided by, with the other batches'."""
        defense = self.defenses[name]
        weights_BS = self._weights(name, batch) if defense.is_objective else None
        if weights_BS is None:
            return defense.count(batch)
        return weights_BS[batch.labelled_BS].double().sum()

    def _weights(self, name: str, batch: Batch) -> Tensor | None:
        """(B, S): of the tokens of what replaces cross entropy; None where all are 1."""
        defense = self.defenses[name]
        weights_BS = None
        if defense.has("token_weights"):
            weights_BS = defense.token_weights(batch)
            if not isinstance(weights_BS, Tensor) or weights_BS.shape != batch.labelled_BS.shape:
                what = tuple(weights_BS.shape) if isinstance(weights_BS, Tensor) else weights_BS
                raise UserCodeError(
                    f"defenses.{name}: token_weights must return a tensor of shape "
                    f"{tuple(batch.labelled_BS.shape)}, not {what}"
                )
            weights_BS = weights_BS.detach().float()
            found_T = weights_BS[batch.labelled_BS]
            if not (found_T.isfinite() & (found_T >= 0)).all():
                raise UserCodeError(f"defenses.{name}: token_weights must be finite and >= 0")
        safe_weight = self._ce_weights.get("ce_safe", 1.0)
        if safe_weight != 1.0:
            of_row_B = 1.0 + (safe_weight - 1.0) * batch.from_source("safe").float()
            weights_BS = of_row_B[:, None] * (
                torch.ones_like(batch.labelled_BS, dtype=torch.float32)
                if weights_BS is None
                else weights_BS
            )
        return weights_BS


def labelled(batch: Batch, term: str) -> Tensor:
    """Where the cross entropy called `ce`, `ce_task` or `ce_safe` acts."""
    if term == "ce":
        return batch.labelled_BS
    return batch.labelled_BS & batch.from_source(term.removeprefix("ce_"))[:, None]


def values_of(defense: Defense) -> LogitTerm:
    """A defense's `logit_term` as a term's `compute`; cross entropy, where it only weighs that."""
    return partial(_values, defense) if defense.has("logit_term") else cross_entropy


def _values(
    defense: Defense,
    policy_TV: Tensor,
    reference_TV: Tensor | None,
    targets_T: Tensor,
    places_T: Tensor | None,
) -> Tensor:
    if not defense.needs_targets:
        return defense.logit_term(policy_TV, reference_TV)
    more = (targets_T, places_T)
    return defense.logit_term(policy_TV, reference_TV, *more)  # type: ignore[call-arg]
