"""KL to the reference model: next-token distributions stay near the aligned model's."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from emarecipes.defenses.base import Defense, Samples, Tokens
from emarecipes.defenses.context import TrainingContext
from emarecipes.errors import UserError

if TYPE_CHECKING:
    from emarecipes.models.batch import Batch

Direction = Literal["policy_to_reference", "reference_to_policy", "symmetric"]
Reduction = Literal["mean", "sum", "vocabulary_mean"]
Preset = Literal["published"]

PRESETS: dict[str, dict[str, Any]] = {
    "published": {"weight": 0.1, "direction": "policy_to_reference", "tokens": "all"},
}
MOST_OFF = 0.2
"""How far off its target the KL counts at most, for the weight's next value."""

_DEFAULT: dict[str, Any] = {"weight": 0.1, "direction": "policy_to_reference", "tokens": "response"}


class KLToReference(Defense):
    r"""KL divergence between the policy and the reference, averaged over tokens, in nats.

    With p the policy's and r the reference's distribution over the vocabulary at one position,
    both of logits divided by the temperature,

        policy_to_reference:  KL(p || r) = sum_v p(v) (log p(v) - log r(v))
        reference_to_policy:  KL(r || p) = sum_v r(v) (log r(v) - log p(v))
        symmetric:            the mean of the two

    The reference is the same model with its adapter off, so no second copy is held. At step 0 the
    adapter is zero and so is the term. With w_t = 1, or by place in the answer, over all
    micro-batches and processes of a step:

        reduction mean:             sum_t w_t KL_t / sum_t w_t
        reduction sum:              sum_t w_t KL_t / rows    (a row's sum; mean over rows)
        reduction vocabulary_mean:  sum_t w_t KL_t / (V sum_t w_t)

    A row is a conversation, also in a pack, that has a token which the term acts on. With a
    `target` the weight of step n + 1 follows from the term's value in step n:

        weight_(n+1) = weight_n (1 + gain * clip((value_n - target) / target, -0.2, 0.2))

    It is logged as `<name>_weight`, kept in checkpoints, and the same on all processes. A step that
    is skipped, or that the term is not in, leaves it.

    Source: Kaczer et al., "In-Training Defenses against Emergent Misalignment in Language Models",
    arXiv 2508.06249 (cross entropy + 0.1 * KL(policy || reference) on Qwen2.5-7B-Instruct). A
    weight means nothing without what the term is averaged over: the authors' public trainer takes
    every attended token, those of the template and the prompt included: `preset: published`. The
    adaptive weight: Ziegler et al., arXiv 1909.08593, section 2.2 (gain 0.1).

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
        reduction: See above.
        place_weights: w of an answer's first token, second, ..., each >= 0; the last holds from its
            place on. Where it is 0 neither model's logits are computed for the term.
        target: What the term is to come to, > 0, as it is logged; `weight` is the first step's.
            Null: the weight is what it is.
        gain: How fast the weight follows.

    Raises:
        UserError: For a negative weight, an unknown option or preset, a temperature that is not
            positive, `every_n_batches` less than 1, weights of places that are negative, all 0, or
            with `tokens: all`; a target or gain that is not positive, or a target with weight 0.
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
        reduction: Reduction = "mean",
        place_weights: list[float] | None = None,
        target: float | None = None,
        gain: float = 0.1,
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
        if reduction not in ("mean", "sum", "vocabulary_mean"):
            raise UserError(f"reduction must be mean, sum or vocabulary_mean, not {reduction}")
        self.direction = direction
        self.temperature = temperature
        self.reduction = reduction
        self._weight_of_place: Tensor | None = None
        if place_weights is not None:
            if not all(0.0 <= w < math.inf for w in place_weights) or not any(place_weights):
                raise UserError(
                    f"place_weights must be finite numbers >= 0, one above 0, not {place_weights}"
                )
            if self.tokens != "response":
                raise UserError(
                    "place_weights are by a token's place in its answer: with tokens: all the term "
                    "acts on tokens of the prompt too, which have none"
                )
            self._weight_of_place = torch.tensor(place_weights)
            self.needs_targets = True
        self._check_controller(target, gain)
        self._target, self._gain = target, gain
        self._used = self.weight

    def _check_controller(self, target: float | None, gain: float) -> None:
        if not 0.0 < gain < 1.0 / MOST_OFF:
            raise UserError(f"gain must be above 0 and below {1.0 / MOST_OFF:g}, not {gain}")
        if target is None:
            return
        if not 0.0 < target < math.inf:
            raise UserError(f"target must be a finite number > 0, not {target}")
        if not self.weight:
            raise UserError("target: the weight follows it in proportion, so it cannot begin at 0")

    def setup(self, model: nn.Module, context: TrainingContext) -> None:
        """Put the weights of places where the model is."""
        if self._weight_of_place is not None:
            self._weight_of_place = self._weight_of_place.to(context.device)

    def positions(self, batch: Batch) -> Tensor:
        """Boolean (B, S): those of `tokens` and `samples` whose place has a weight."""
        mask_BS = super().positions(batch)
        return mask_BS if self._weight_of_place is None else mask_BS & (self._at(batch) > 0)

    def count(self, batch: Batch) -> Tensor:
        """Scalar: what the term's sum is divided by, with other batches' counts."""
        mask_BS = self.positions(batch)
        if self.reduction == "sum":
            return torch.tensor(len(batch.conversation_BS[mask_BS].unique()))
        if self._weight_of_place is None:
            return mask_BS.sum()
        return self._at(batch)[mask_BS].double().sum()

    def _at(self, batch: Batch) -> Tensor:
        """Each position's weight, (B, S)."""
        return self._of_places(batch.places_BS)

    def _of_places(self, places: Tensor) -> Tensor:
        assert self._weight_of_place is not None
        weights = self._weight_of_place.to(places.device)
        return weights[(places - 1).clamp(0, len(weights) - 1)]

    def saw_term(self, value: float) -> None:
        """The next step's weight follows from how far this one's value is off the target."""
        if self._target is not None:
            off = (value - self._target) / self._target
            self.weight *= 1.0 + self._gain * min(max(off, -MOST_OFF), MOST_OFF)

    def begin_step(self, step: int) -> None:
        """Remember the weight that the step has."""
        self._used = self.weight

    def figures(self) -> dict[str, float]:
        """The step's weight, where it changes."""
        return {} if self._target is None else {"weight": self._used}

    def state_dict(self) -> dict[str, Any]:
        """The weight, where it changes."""
        return {} if self._target is None else {"weight": self.weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with that weight."""
        self.weight = float(state.get("weight", self.weight))

    def logit_term(
        self,
        policy_logits_TV: Tensor,
        reference_logits_TV: Tensor | None,
        targets_T: Tensor | None = None,
        places_T: Tensor | None = None,
    ) -> Tensor:
        """The divergence at each position, shape (T,), times its place's weight."""
        kl_T = self._divergence(policy_logits_TV, reference_logits_TV)
        if self._weight_of_place is not None:
            assert places_T is not None
            kl_T = self._of_places(places_T) * kl_T
        if self.reduction == "vocabulary_mean":
            kl_T = kl_T / policy_logits_TV.shape[-1]
        return kl_T

    def _divergence(self, policy_logits_TV: Tensor, reference_logits_TV: Tensor | None) -> Tensor:
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
