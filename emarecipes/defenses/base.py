"""What a defense may do during training.

Shapes: B batch, S sequence, T positions, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from emarecipes.defenses.context import AdaptedModule, TrainingContext
from emarecipes.errors import Extension, UserError
from emarecipes.models.source import ModelSource

if TYPE_CHECKING:
    from torchtune.data import Message

    from emarecipes.models.batch import Batch

Tokens = Literal["response", "all"]
Samples = Literal["all", "task", "safe"]

TERMS = ("logit_term", "hidden_term", "weight_term", "step_term")
"""The methods that are a term of the loss, of which a class has one."""


class Defense(Extension):
    """A term of the loss, a change to the data, an act after each step, or several of these.

    Subclass it, override what you need, and name the class in the config. Methods that are not
    overridden cost nothing. The training loss is

        cross entropy + sum over defenses of weight * term,

    where a defense's term is the sum of what its `logit_term` or `hidden_term` returns, divided by
    `count` over all micro-batches and processes of the step; or the mean (or sum) of what its
    `weight_term` returns for the adapted layers, once a step; or what its `step_term` returns, once
    a step. A class has one of the four.

    A class may take cross entropy's place instead: with `replaces_cross_entropy`, its `logit_term`
    gives each trained token's loss; with `token_weights`, cross entropy's (or the `logit_term`'s)
    tokens are weighed. Then the loss is

        weight * sum_t w_t (value of token t) / sum_t w_t  +  the other terms,

    w_t = 1 without `token_weights`, times `dataset.safe.ce_weight` in safe rows. Cross entropy
    itself is logged as ever, and trains nothing. At weight 0 it trains, and this only measures.
    A run has one such defense; it acts on every trained token in every step.

    Args:
        weight: Factor of this defense's term in the loss, >= 0.
        tokens: Positions the term acts on: those whose next token is trained ("response"), or
            those whose next token is any real one, the prompt included ("all").
        samples: Rows the term acts on: "all", or those whose source is "task" or "safe".
        every_n_batches: k: the term is computed in one step of every k, in one drawn at random,
            with k times its weight there: the gradient's expectation is that of k = 1.

    Raises:
        UserError: If `weight` is negative or not finite, `tokens` or `samples` is unknown, or
            `every_n_batches` is less than 1.
    """

    needs_reference: bool = False
    """Whether the terms need the reference: the same model with its adapter off."""

    needs_targets: bool = False
    """Whether `logit_term` is given two more arguments: the next tokens and their places."""

    reads_reference_at_targets: bool = False
    """Whether `logit_term` needs the reference's log-probability of the next token alone: it is
    given that, (T,), in place of `reference_logits_TV`. A reference cache then holds one number a
    token, where no other defense needs more."""

    replaces_cross_entropy: bool = False
    """Whether the `logit_term` takes cross entropy's place instead of being added to it."""

    module_reduction: Literal["mean", "sum"] = "mean"
    """What becomes of `weight_term`'s values: their mean over the layers that have one, or sum."""

    apart: Sequence[str] = ()
    """Terms whose gradient `before_update` is given apart: "own", this defense's; "ce", the
    objective's; or another defense's by its name in the config. Each takes a forward and backward
    of its own, over the rows of its `samples`, and one more gradient of the adapter is held."""

    hidden_layers: Sequence[int] = ()
    """Residual-stream indices that `hidden_term` reads: i is the input of layer i, from 0."""

    def __init__(
        self,
        weight: float = 1.0,
        tokens: Tokens = "response",
        samples: Samples = "all",
        every_n_batches: int = 1,
    ) -> None:
        if not 0.0 <= weight < float("inf"):
            raise UserError(f"weight must be a finite number >= 0, not {weight}")
        if tokens not in ("response", "all"):
            raise UserError(f"tokens must be response or all, not {tokens}")
        if samples not in ("all", "task", "safe"):
            raise UserError(f"samples must be all, task or safe, not {samples}")
        if every_n_batches < 1:
            raise UserError(f"every_n_batches must be >= 1, not {every_n_batches}")
        self.every_n_batches = every_n_batches
        self.weight = weight
        self.tokens = tokens
        self.samples = samples

    gradient_ratio_every: int = 0
    """Every how many steps, from step 10 on, the norm of the whole step's gradient of `weight *
    term` over that of cross entropy is logged as `<name>_gradient_ratio`; 0: once, when the term
    first acts from step 10 on, or in a shorter run's last step, from the third on. A run warns
    where it is 0. It takes further forwards."""

    effect_figure: str | None = None
    """The key of `figures` under which stands how large what this defense changes is over what it
    is changed in. Where it is below 1e-4 in every step until step 10 (or a shorter run's last), or
    is not logged, the run warns: it does next to nothing. For defenses without a term."""

    def check(self, source: ModelSource) -> None:
        """Check this defense against the model, before any weight is loaded.

        Raises:
            UserError: If it cannot work with this model.
        """

    def check_template(self, tokenizer: Any) -> None:
        """Check this defense against torchtune's model transform, before any weight is loaded.

        Raises:
            UserError: It cannot work with this chat template.
        """

    def check_rows(self, rows: Sequence[dict[str, Any]]) -> None:
        """Check this defense against the run's rows, tokenized, before any weight is loaded.

        Each has `tokens` and `labels`, and packs what torchtune gives them; see
        `emarecipes.models.batch.conversations`.

        Raises:
            UserError: It cannot work with these rows.
        """

    def setup(self, model: nn.Module, context: TrainingContext) -> None:
        """Called once, after the model is built, loaded and sharded, before the first step."""

    def transform_messages(self, messages: list[Message], source: str) -> list[Message]:
        """Change a row's messages before they are tokenized. `source` is "task" or "safe"."""
        return messages

    def needed_sources(self) -> dict[str, str]:
        """Keys of the config, and the source of rows without which each does nothing."""
        return {} if self.samples == "all" else {"samples": self.samples}

    def positions(self, batch: Batch) -> Tensor:
        """Boolean (B, S): the positions that `logit_term` is asked for."""
        mask_BS = batch.labelled_BS if self.tokens == "response" else batch.real_BS
        if self.samples != "all":
            mask_BS = mask_BS & batch.from_source(self.samples)[:, None]
        return mask_BS

    def count(self, batch: Batch) -> Tensor:
        """Scalar: how many items (tokens, or samples) the terms of this batch sum over."""
        return self.positions(batch).sum()

    def logit_term(self, policy_logits_TV: Tensor, reference_logits_TV: Tensor | None) -> Tensor:
        """The term at each position, shape (T,), from next-token logits in float32.

        Logits are given as log-probabilities (normalised, so `exp` of them sums to 1). Called
        chunk by chunk on the positions that `positions` selects. `reference_logits_TV` carries no
        gradient, and is None unless `needs_reference`.

        With `needs_targets` it is called with two more tensors of integers, (T,), behind these:
        `targets_T`, the next token's id; and `places_T`, which token of its answer that is, from 1;
        0 where it is not trained (`tokens: all`). An answer is a run of trained tokens.
        """
        raise NotImplementedError

    def token_weights(self, batch: Batch) -> Tensor:
        """The weight of each trained token in the loss, (B, S) as `batch.labelled_BS`, >= 0.

        See above; other positions' are not read. Called with the batch on the CPU, to count, and on
        the model's device: it must be a function of the batch alone.
        """
        raise NotImplementedError

    def hidden_term(
        self,
        policy_hidden: Mapping[int, Tensor],
        reference_hidden: Mapping[int, Tensor] | None,
        batch: Batch,
    ) -> Tensor:
        """Scalar: the sum of the term over the batch, from {layer: (B, S, D)} hidden states."""
        raise NotImplementedError

    def weight_term(self, module: AdaptedModule) -> Tensor | None:
        """The term of one adapted layer, a scalar; None where it has no say (B is 0, say).

        Called once a step for every layer, after the micro-batches' backwards, on every process;
        the gradient with respect to `module.a_RI` and `module.b_OR` is taken on the spot. Under
        FSDP2 the two matrices of one layer are gathered at a time: rank * (in + out) numbers.
        Every process must return the same.
        """
        raise NotImplementedError

    def step_term(self, forward: Callable[..., Tensor]) -> Tensor:
        """The term of a whole step, a scalar, from a forward of its own; called once a step.

        `forward(tokens_BS)` runs the policy, without dropout, on tokens that need be in no row, and
        returns the residual stream after the last layer, (B, S, D); hooks on the model's layers see
        the rest. `forward(tokens_BS, adapter=False)` runs the reference, without gradient. Neither
        is inside `policy_forward`: it is the model as it will be used. Every process must call it
        as often and return the same. Compiled layers run uncompiled there.
        """
        raise NotImplementedError

    def step_term_in_rows(
        self, batch: Batch, forward: Callable[..., Tensor]
    ) -> AbstractContextManager[Callable[[], Tensor]] | None:
        """Where the policy's own forward of `batch` holds what `step_term` would compute.

        A context around that forward; what it gives returns the term afterwards. None: `step_term`
        is called. Asked in a step's first micro-batch, where its forward is the model as it will be
        used: no dropout, `policy_forward` or compiled layer. Every process must answer alike.
        """
        return None

    def begin_step(self, step: int) -> None:
        """Called before step number `step`, from 1, also in a resumed run, on every process."""

    def policy_forward(self, batch: Batch) -> AbstractContextManager[None]:
        """A context around the policy's forward of `batch` in training, and around nothing else.

        It ends after the backward, in which checkpointed layers run again.
        """
        return nullcontext()

    def before_update(
        self,
        model: nn.Module,
        step: int,
        apart: Mapping[str, Sequence[tuple[nn.Parameter, Tensor]]],
    ) -> None:
        """Change the gradient of step number `step`, from 1, before it is clipped.

        Called once a step, after all micro-batches' backwards. `parameter.grad` is the gradient of
        the whole loss. `apart` has, for each name in `self.apart`, what part of it is that of
        weight * term: (parameter, gradient) of each trained parameter. A name is left out in steps
        that the term is not in, and at weight 0. Under FSDP2 these are shards (`DTensor`): what is
        computed across parameters must be summed over the processes.
        """

    def saw_term(self, value: float) -> None:
        """Called before `after_step` with the term's value, as logged, where a step had the term.

        The same on every process. Not called where a step was skipped (`skip_nonfinite`).
        """

    def after_step(self, model: nn.Module, step: int) -> None:
        """Called after the optimizer's step number `step`, counted from 1."""

    def stopped_early(self, model: nn.Module, step: int) -> None:
        """Called after step number `step` where the probe ends the run there, before its last one.

        What `after_step` keeps for the last step is to be done now. Every process calls it.
        """

    def saved_adapter(self) -> dict[str, Tensor]:
        """Another adapter, saved as `adapter_<name>/` whenever the run's own is.

        Its whole tensors on the CPU, by the run's own names and shapes. Every process calls it.
        `after_step` and `stopped_early` of a defense that has one come after all others', so that
        it sees what they left, whatever its name.
        """
        raise NotImplementedError

    def figures(self) -> dict[str, float]:
        """Further figures of the last step, logged as `<name>_<key>` by the first process."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What must be stored to resume this defense; the same on every process.

        Tensors, numbers, strings and containers of these.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""

    @property
    def is_objective(self) -> bool:
        """Whether this is of the kind that takes cross entropy's place."""
        return self.replaces_cross_entropy or self.has("token_weights")

    def has(self, method: str) -> bool:
        """Whether this class overrides the named method of `Defense`."""
        return getattr(type(self), method) is not getattr(Defense, method)
