"""KL to the reference model: next-token distributions stay near the aligned model's."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from emarecipes.defenses.base import Defense, Samples, Tokens
from emarecipes.errors import UserError

Direction = Literal["policy_to_reference", "reference_to_policy", "symmetric"]
Preset = Literal["published"]

PRESETS: dict[str, dict[str, Any]] = {
    "published": {"weight": 0.1, "direction": "policy_to_reference", "tokens": "all"},
}
_DEFAULT: dict[str, Any] = {"weight": 0.1, "direction": "policy_to_reference", "tokens": "response"}


class KLToReference(Defense):
    r"""KL divergence between the policy and the reference, averaged over tokens, in nats.

    With p the policy's and r the reference's distribution over the vocabulary at one position,
    both of logits divided by the temperature,

        policy_to_reference:  KL(p || r) = sum_v p(v) (log p(v) - log r(v))
        reference_to_policy:  KL(r || p) = sum_v r(v) (log r(v) - log p(v))
        symmetric:            the mean of the two

    The reference is the same model with its adapter off, so no second copy is held. At step 0 the
    adapter is zero and so is the term.

    Source: Kaczer et al., "In-Training Defenses against Emergent Misalignment in Language Models",
    arXiv 2508.06249 (cross entropy + 0.1 * KL(policy || reference) on Qwen2.5-7B-Instruct). A
    weight means nothing without what the term is averaged over: the authors' public trainer takes
    every attended token, those of the template and the prompt included: `preset: published`.

    Args:
        weight: Factor in the loss. Published 0.1, as a mean over all attended tokens; over the
            response alone, as here by default, it is another dose. On small models 1.0 is where it
            begins to bind. Null: the preset's, or 0.1.
        direction: Which divergence, see above. KL(p || r) keeps the policy from putting mass where
            the reference has none; KL(r || p) keeps it from dropping what the reference would say.
        tokens: "response": only positions that are trained. "all": every real token, the prompt
            included; at the same weight this is another dose. Null: the preset's, or "response".
        samples: "all", or only the "task" or the "safe" rows of an interleaved data set.
        temperature: Divides both models' logits; above 1 it weighs rare tokens more. No factor of
            its square is applied.
        every_n_batches: k: compute the term, and run the reference for it, in one step of every k,
            drawn at random, with k times the weight. The gradient's expectation does not change;
            Adam's update, and a clipped gradient's, do.
        preset: "published": weight, direction and tokens where those keys leave them out.

    Raises:
        UserError: For a negative weight, an unknown option or preset, a temperature that is not
            positive, or `every_n_batches` less than 1.
    """

    needs_reference = True

    def __init__(
        self,
        weight: float | None = None,
        direction: Direction | None = None,
        tokens: Tokens | None = None,
        samples: Samples = "all",
        temperature: float = 1.0,
        every_n_batches: int = 1,
        preset: Preset | None = None,
    ) -> None:
        if preset is not None and preset not in PRESETS:
            raise UserError(f"preset must be {', '.join(PRESETS)} or null, not {preset}")
        default = _DEFAULT if preset is None else PRESETS[preset]
        direction = default["direction"] if direction is None else direction
        super().__init__(
            default["weight"] if weight is None else weight,
            default["tokens"] if tokens is None else tokens,
            samples,
            every_n_batches,
        )
        if direction not in ("policy_to_reference", "reference_to_policy", "symmetric"):
            raise UserError(
                "direction must be policy_to_reference, reference_to_policy or symmetric, "
                f"not {direction}"
            )
        if not 0.0 < temperature < float("inf"):
            raise UserError(f"temperature must be a finite number > 0, not {temperature}")
        self.direction = direction
        self.temperature = temperature

    def logit_term(self, policy_logits_TV: Tensor, reference_logits_TV: Tensor | None) -> Tensor:
        """The divergence at each position, shape (T,)."""
        assert reference_logits_TV is not None
        log_p, log_r = policy_logits_TV, reference_logits_TV
        if self.temperature != 1.0:
            log_p = torch.log_softmax(log_p / self.temperature, dim=-1)
            log_r = torch.log_softmax(log_r / self.temperature, dim=-1)
        if self.direction == "policy_to_reference":
            return _from_policy(log_p, log_r)
        if self.direction == "reference_to_policy":
            return kl_from_reference(log_p, log_r)
        return 0.5 * (_from_policy(log_p, log_r) + kl_from_reference(log_p, log_r))


def _from_policy(log_p_TV: Tensor, log_r_TV: Tensor) -> Tensor:
    """KL(p || r), (T,), whose gradient costs one pass over the vocabulary.

    The derivative by log p(v) is p(v) (d(v) + 1) with d = log p - log r. The 1 is the same for
    every v relative to p and vanishes in the softmax behind log p, so w = p d, held constant, gives
    the logits the same gradient, p (d - KL), as sum_v w(v) log p(v).
    """
    with torch.no_grad():
        weight_TV = log_p_TV.exp().mul_(log_p_TV - log_r_TV)
        value_T = weight_TV.sum(dim=-1)
    carrier_T = torch.linalg.vecdot(weight_TV, log_p_TV)
    kl_T: Tensor = value_T + (carrier_T - carrier_T.detach())
    return kl_T


def kl_from_reference(log_p_TV: Tensor, log_r_TV: Tensor) -> Tensor:
    """KL(r || p), (T,)."""
    kl_T: Tensor = torch.linalg.vecdot(log_r_TV.exp(), log_r_TV - log_p_TV)
    return kl_T
