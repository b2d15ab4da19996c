"""l2 distance in feature space: hidden states stay near the aligned model's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from emarecipes.defenses.base import Defense, Samples
from emarecipes.errors import UserError
from emarecipes.models.source import ModelSource

if TYPE_CHECKING:
    from emarecipes.models.batch import Batch

FeatureTokens = Literal["response", "all", "last", "mean"]
Normalize = Literal["none", "token", "sequence"]
Preset = Literal["paper", "ldifs", "ema_rl"]

_EPS = 1e-12

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"every_n_layers": 5, "tokens": "response", "normalize": "none"},
    "ldifs": {
        "num_layers": 5,
        "tokens": "mean",
        "normalize": "token",
        "average_dimensions": True,
    },
    "ema_rl": {"num_layers": 5, "tokens": "all", "normalize": "sequence"},
}


class FeatureL2(Defense):
    r"""Squared l2 distance between the policy's and the reference's residual stream.

    With h_l the residual stream after l layers, at the chosen layers and tokens,

        term = mean over items of  sum_l || f(h_l^policy) - f(h_l^reference) ||^2

    where f is the identity or a scaling to unit norm. An item is a token, or a conversation for
    `tokens` "last" and "mean" and for `normalize` "sequence". The reference is the same model with
    its adapter off and carries no gradient; the policy does.

    A weight means nothing without the shape of the term, so three published ones have names:

    - `paper` (Kaczer et al., arXiv 2508.06249; weight 1.0): every 5th layer, raw vectors. Over the
      tokens of the response: the paper's notes do not say which. No public code computes this.
    - `ldifs` (Mukhoti et al., 2024, "Fine-tuning can cripple your foundation model"; weight about
      10): each layer's feature at unit norm, dimensions averaged. It is an image model's; here five
      layers and the mean over the response stand for its pooled features.
    - `ema_rl` (the same authors' public trainer; weight 10): five evenly spaced layers, each
      flattened over the whole sequence, at unit norm, summed.

    Args:
        weight: Factor in the loss; read it by the logged `<name>_gradient_ratio`.
        preset: Gives what the keys below leave out. Null: they alone count.
        layers: Indices l, from 1 to the number of layers, or
        every_n_layers: l = n, 2n, ..., or
        num_layers: that many, evenly spaced, the last layer included.
        tokens: "response": positions whose next token is trained. "all": every real token. "last":
            the last of the response, "mean": the mean vector over it.
        samples: "all", or only the "task" or the "safe" rows of an interleaved data set.
        skip_first_token: Leave out each conversation's first token, whose state is often huge.
        normalize: "none"; "token": each layer's vector at unit norm; "sequence": each layer's
            vectors of a conversation, flattened, at unit norm.
        average_dimensions: Divide by layers x width: a mean over dimensions, not a sum.
        gradient_ratio_every: Log the ratio of this term's gradient to cross entropy's every that
            many steps (at step 10 first); 0: the first time alone. It costs two further steps' time
            each.
        every_n_batches: k: compute the term in one step of every k, see `KLToReference`. The ratio,
            of k times the weight, is then logged in that step of the k where it would be due.

    Raises:
        UserError: An unknown option, or not exactly one choice of layers.
    """

    needs_reference = True

    def __init__(
        self,
        weight: float = 1.0,
        preset: Preset | None = "paper",
        layers: list[int] | None = None,
        every_n_layers: int | None = None,
        num_layers: int | None = None,
        tokens: FeatureTokens | None = None,
        samples: Samples = "all",
        skip_first_token: bool = False,
        normalize: Normalize | None = None,
        average_dimensions: bool | None = None,
        gradient_ratio_every: int = 50,
        every_n_batches: int = 1,
    ) -> None:
        if preset is not None and preset not in PRESETS:
            raise UserError(f"preset must be {', '.join(PRESETS)} or null, not {preset}")
        choice: dict[str, Any] = {
            "layers": layers,
            "every_n_layers": every_n_layers,
            "num_layers": num_layers,
        }
        default = PRESETS[preset] if preset else {}
        if all(value is None for value in choice.values()):
            choice |= {key: default[key] for key in choice if key in default}
        choice = {key: value for key, value in choice.items() if value is not None}
        if len(choice) != 1:
            raise UserError("exactly one of layers, every_n_layers and num_layers must be given")
        self._choice = choice
        self._pooling = _one_of(
            "tokens", tokens or default.get("tokens", "response"), FeatureTokens
        )
        self._normalize = _one_of(
            "normalize", normalize or default.get("normalize", "none"), Normalize
        )
        if self._normalize == "sequence" and self._pooling in ("last", "mean"):
            raise UserError(f"normalize: sequence needs tokens response or all, not {tokens}")
        if average_dimensions is None:
            average_dimensions = bool(default.get("average_dimensions", False))
        self._average = average_dimensions
        self._skip_first = skip_first_token
        if gradient_ratio_every < 0:
            raise UserError(f"gradient_ratio_every must be >= 0, not {gradient_ratio_every}")
        self.gradient_ratio_every = gradient_ratio_every
        super().__init__(
            weight, "all" if self._pooling == "all" else "response", samples, every_n_batches
        )

    def check(self, source: ModelSource) -> None:
        """Choose the layers by the model's depth.

        Raises:
            UserError: A layer that the model does not have.
        """
        depth = len(source.meta_model.layers)
        ((how, value),) = self._choice.items()
        if how == "layers":
            chosen = list(value)
            if not chosen or len(set(chosen)) != len(chosen):
                raise UserError("layers must name at least one layer, each once")
            wrong = [layer for layer in chosen if not 1 <= layer <= depth]
            if wrong:
                raise UserError(f"layers: {wrong[0]} is not in 1..{depth}, the model's layers")
        elif not 1 <= value <= depth:
            raise UserError(f"{how} must be from 1 to {depth}, the model's layers, not {value}")
        elif how == "every_n_layers":
            chosen = list(range(value, depth + 1, value))
        else:
            chosen = [round(depth * (i + 1) / value) for i in range(value)]
        self.hidden_layers = sorted(chosen)

    def positions(self, batch: Batch) -> Tensor:
        """Boolean (B, S): the positions whose features are compared."""
        mask_BS = batch.labelled_BS if self.tokens == "response" else batch.conversation_BS >= 0
        if self.samples != "all":
            mask_BS = mask_BS & batch.from_source(self.samples)[:, None]
        return mask_BS & ~batch.first_BS if self._skip_first else mask_BS

    def count(self, batch: Batch) -> Tensor:
        """Scalar: tokens, or conversations that have any."""
        items = self._items(batch)
        per_token = self._pooling in ("response", "all") and self._normalize != "sequence"
        return torch.tensor(len(items.number_T) if per_token else len(items.size_I))

    def hidden_term(
        self,
        policy_hidden: Mapping[int, Tensor],
        reference_hidden: Mapping[int, Tensor] | None,
        batch: Batch,
    ) -> Tensor:
        """Scalar: the sum of the distances over the items of the batch."""
        assert reference_hidden is not None
        items = self._items(batch)
        total = torch.zeros((), device=batch.targets_BS.device)
        for layer in self.hidden_layers:
            policy = self._features(policy_hidden[layer][items.mask_BS].float(), items)
            reference = self._features(reference_hidden[layer][items.mask_BS].float(), items)
            total = total + (policy - reference).square().sum()
        if self._average:
            total = total / (len(self.hidden_layers) * policy.shape[-1])
        return total

    def _items(self, batch: Batch) -> _Items:
        mask_BS = self.positions(batch)
        _, number_T, size_I = batch.conversation_BS[mask_BS].unique_consecutive(
            return_inverse=True, return_counts=True
        )
        return _Items(mask_BS, number_T, size_I)

    def _features(self, hidden_TD: Tensor, items: _Items) -> Tensor:
        if self._pooling == "last":
            hidden_TD = hidden_TD[items.size_I.cumsum(0) - 1]
        elif self._pooling == "mean":
            sums_ID = _sum_by_item(hidden_TD, items)
            hidden_TD = sums_ID / items.size_I[:, None]
        if self._normalize == "token":
            return F.normalize(hidden_TD, dim=-1, eps=_EPS)
        if self._normalize == "sequence":
            norm_I = _sum_by_item(hidden_TD.square().sum(dim=-1), items).sqrt().clamp(min=_EPS)
            return hidden_TD / norm_I[items.number_T][:, None]
        return hidden_TD


class _Items(NamedTuple):
    """The compared positions, (B, S), each one's conversation, (T,), and their sizes, (I,)."""

    mask_BS: Tensor
    number_T: Tensor
    size_I: Tensor


def _sum_by_item(values: Tensor, items: _Items) -> Tensor:
    sums = values.new_zeros(len(items.size_I), *values.shape[1:])
    return sums.index_add(0, items.number_T, values)


def _one_of(key: str, value: str, options: Any) -> str:
    if value not in options.__args__:
        raise UserError(f"{key} must be one of {', '.join(options.__args__)}, not {value}")
    return value
