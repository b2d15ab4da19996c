"""ASFT, Anchored Supervised Fine-Tuning: likely tokens are learned, unlikely ones hardly."""

from __future__ import annotations

from torch import Tensor

from emarecipes.defenses.base import Defense
from emarecipes.defenses.kl import kl_from_reference
from emarecipes.errors import UserError


class AnchoredSFT(Defense):
    r"""Cross entropy weighed by the policy's own probability, with a KL anchor; for cross entropy.

    With p and r the policy's and the reference's distribution at a trained token y, sg what carries
    no gradient, and w the anchor, the loss of a token is, in nats,

        sg(p(y)) (-log p(y)) + w KL(r || p),    KL(r || p) = sum_v r(v) (log r(v) - log p(v))

    in place of -log p(y); the loss is its mean over trained tokens. The first part alone is DFT
    (arXiv 2508.05629): a token that the model finds unlikely, as it does those of another persona,
    hardly pulls. It has a pull of its own towards being surer, which the anchor holds.

    The cross entropy is logged beside it, and trains nothing. The anchor by itself is in the log
    with `KLToReference` at `direction: reference_to_policy`, `weight: 0`.

    Source: Zhu et al., "Anchored Supervised Fine-Tuning", arXiv 2509.23753; the direction of the
    KL, its mean over trained tokens and w = 0.05 are those of the authors' public code. Not to be
    mixed up with AsFT, arXiv 2506.08473, which penalises the update off an alignment direction:
    that is `AsFT`.

    Args:
        weight: Factor of the loss. 0: cross entropy trains, and this is only measured.
        anchor: w; 0: DFT, without a reference.

    Raises:
        UserError: For a negative weight, or an anchor that is negative or not finite.
    """

    needs_targets = True
    replaces_cross_entropy = True

    def __init__(self, weight: float = 1.0, anchor: float = 0.05) -> None:
        super().__init__(weight)
        if not 0.0 <= anchor < float("inf"):
            raise UserError(f"anchor must be a finite number >= 0, not {anchor}")
        self._anchor = anchor
        self.needs_reference = anchor > 0

    def logit_term(
        self,
        policy_logits_TV: Tensor,
        reference_logits_TV: Tensor | None,
        targets_T: Tensor | None = None,
        places_T: Tensor | None = None,
    ) -> Tensor:
        """The loss of each token, (T,)."""
        assert targets_T is not None
        log_p_T = policy_logits_TV.gather(1, targets_T[:, None])[:, 0]
        value_T = -log_p_T.detach().exp() * log_p_T
        if reference_logits_TV is not None:
            value_T = value_T + self._anchor * kl_from_reference(
                policy_logits_TV, reference_logits_TV
            )
        return value_T
