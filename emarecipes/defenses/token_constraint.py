"""Token constraint: the first tokens of an answer may hardly become likelier than they were."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emarecipes.defenses.base import Defense
from emarecipes.defenses.context import TrainingContext
from emarecipes.errors import UserError


class TokenConstraint(Defense):
    r"""A bounded pull towards each token of the answer, strongest bound first; for cross entropy.

    With p_t the policy's and r_t the reference's probability of the answer's t-th token, t from 1,
    and beta_t the t-th of `betas` (the last for all that follow), the loss of a token is

        -(2 / beta_t) log sigma(beta_t (log p_t - log r_t))

    in place of -log p_t; the loss is its mean over trained tokens, in nats. Its gradient is cross
    entropy's times 2 (1 - sigma(beta_t (log p_t - log r_t))): the same at the start, where p = r,
    less the further p is above r, the sooner the larger beta_t; below r up to twice as much. At
    the start its value is the mean of (2 / beta_t) log 2: a level that says nothing by itself.
    The cross entropy is logged beside it, and trains nothing.

    Source: Qi et al., "Safety Alignment Should be Made More Than Just a Few Tokens Deep",
    arXiv 2406.05946, section 4: beta 0.5 at the first token, 2 at the next four, 0.1 after. Their
    code's factor of the gradient is never below 1e-3; here it is what the formula says.

    Args:
        weight: Factor of the loss. 0: cross entropy trains, and this is only measured.
        betas: beta_1, beta_2, ..., each > 0; the last one holds from its place on.

    Raises:
        UserError: For a negative weight; no `betas`, or one that is not finite and positive.
    """

    needs_reference = True
    needs_targets = True
    reads_reference_at_targets = True
    replaces_cross_entropy = True

    def __init__(self, weight: float = 1.0, betas: list[float] | None = None) -> None:
        super().__init__(weight)
        betas = [0.5, 2.0, 2.0, 2.0, 2.0, 0.1] if betas is None else betas
        if not betas or not all(0.0 < beta < float("inf") for beta in betas):
            raise UserError(f"betas must be finite numbers > 0, at least one, not {betas}")
        self._betas = torch.tensor(betas)

    def setup(self, model: nn.Module, context: TrainingContext) -> None:
        """Put the betas where the model is."""
        self._betas = self._betas.to(context.device)

    def logit_term(
        self,
        policy_logits_TV: Tensor,
        reference_T: Tensor | None,
        targets_T: Tensor | None = None,
        places_T: Tensor | None = None,
    ) -> Tensor:
        """The loss of each token, (T,)."""
        assert reference_T is not None and targets_T is not None and places_T is not None
        ratio_T = policy_logits_TV.gather(1, targets_T[:, None])[:, 0] - reference_T
        betas = self._betas.to(places_T.device)  # It is there: but for a model without weights.
        beta_T = betas[(places_T - 1).clamp(0, len(betas) - 1)]
        loss_T: Tensor = -(2.0 / beta_T) * F.logsigmoid(beta_T * ratio_T)
        return loss_T
