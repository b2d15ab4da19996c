"""Prefix anchor: what every conversation begins with stays as the aligned model reads it."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchtune import utils
from torchtune.data import Message

from emarecipes.defenses.base import Defense
from emarecipes.defenses.context import TrainingContext
from emarecipes.errors import UserCodeError, UserError
from emarecipes.models.batch import Batch, conversations

log = utils.get_logger("INFO")

Stream = Literal["raw", "normed"]
KeysValues = tuple[Tensor, Tensor]

# Of a large set so many rows are looked at at most, evenly over it.
_ROWS = 1000

# Users' texts that begin in as many ways: what their conversations share is the template's.
_TEXTS = ("a", "Why?", "7 of 9", "(so)", '"It')


def template_prefix(tokenizer: Any, system: str | None = None) -> list[int]:
    """The tokens that a chat template writes before any user's text.

    Args:
        tokenizer: torchtune's model transform.
        system: The system prompt in them; None: what the template writes without one.
    """
    begin = [] if system is None else [Message("system", system, masked=True)]
    rows = [
        tokenizer.tokenize_messages(
            [*begin, Message("user", text, masked=True), Message("assistant", "b")]
        )[0]
        for text in _TEXTS
    ]
    return _common(*rows)


def _common(*rows: Sequence[int]) -> list[int]:
    """What all begin with."""
    same = takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))
    return [column[0] for column in same]


class PrefixAnchor(Defense):
    r"""Relative squared change of keys and values at the chat template's constant prefix.

    The prefix are the P tokens that the template writes before any user's text: the system block
    and the user's header. With k and v a layer's keys and values (of all its heads) at one of
    them, and k_ref and v_ref those of the reference, the adapter off,

        drift = mean over layers of  mean over prefix tokens of
                    |k - k_ref|^2 / |k_ref|^2  +  |v - v_ref|^2 / |v_ref|^2
        term  = max(drift - threshold, 0)

    Each token after it attends to these, in every conversation: training must then act through what
    the task's text is, not through what the model is in all of them. Attention is causal, so the
    prefix is the same in every row that begins with it, and is read once a step, the reference's
    once a run, without dropout: in the step's own forward where every row begins with it and that
    forward is the model as it will be used, else by a forward of these P tokens alone.
    `<name>_drift` is logged; `weight: 0` measures.

    Source: TReFT, arXiv 2606.06667 (weight 3 to 30; the sum over keys and values, the means over
    tokens and layers). Its code applies the key and value projections, adapter included, to the raw
    residual stream, without the layer's norm: `stream: raw`, the default. Its threshold acts on
    weight * drift, by default 0.1, and 0 in its shipped settings.

    Args:
        weight: Factor in the loss.
        stream: What the projections read: "raw", the residual stream that enters the layer; or
            "normed", its norm, which gives the layer's own keys and values. Both are before RoPE,
            which as a rotation changes no distance, and before a norm of keys.
        threshold: Drift that costs nothing.
        system: The system prompt in the prefix; null: what the template writes without one.
        every_n_batches: k: in one step of every k, see `KLToReference`.

    Raises:
        UserError: For a negative weight or threshold, or an unknown stream; in `check_template` a
            template that writes nothing constant before a user's text.
    """

    def __init__(
        self,
        weight: float = 10.0,
        stream: Stream = "raw",
        threshold: float = 0.0,
        system: str | None = None,
        every_n_batches: int = 1,
    ) -> None:
        super().__init__(weight, every_n_batches=every_n_batches)
        if stream not in ("raw", "normed"):
            raise UserError(f"stream must be raw or normed, not {stream}")
        if not 0.0 <= threshold < float("inf"):
            raise UserError(f"threshold must be a finite number >= 0, not {threshold}")
        self._stream = stream
        self._threshold = threshold
        self._system = system
        self._in_every_row = False
        self._reference: list[KeysValues] | None = None
        self._drift: Tensor | None = None

    def check_template(self, tokenizer: Any) -> None:
        """Find the prefix.

        Raises:
            UserError: There is none, or nothing but a beginning-of-sequence token.
        """
        self._prefix = template_prefix(tokenizer, self._system)
        if not set(self._prefix) - {getattr(tokenizer, "bos_id", None)}:
            raise UserError(
                "the chat template writes nothing constant before a user's text, so there is no "
                "prefix to hold; name a tokenizer with a chat template that has a system block or "
                "a user's header"
            )

    def check_rows(self, rows: Sequence[dict[str, Any]]) -> None:
        """Say where most rows begin otherwise: what is held is then not what training reads."""
        size = len(self._prefix)
        self._in_every_row = all(
            torch.as_tensor(rows[i]["tokens"][:size]).tolist() == self._prefix
            for i in range(len(rows))
        )
        seen = [rows[i] for i in range(0, len(rows), -(-len(rows) // _ROWS))]
        held = [
            len(_common(self._prefix, torch.as_tensor(row["tokens"][start:end]).tolist()))
            for row in seen
            for start, end in conversations(row)
        ]
        share = sum(n == len(self._prefix) for n in held) / len(held)
        if share < 0.5:
            utils.log_rank_zero(
                log,
                f"PrefixAnchor holds {len(self._prefix)} tokens that {share:.0%} of the rows begin "
                f"with; they share {statistics.median(held):.0f} of them: where rows have a system "
                "prompt of their own, name it in `system`",
                level=logging.WARNING,
            )

    def setup(self, model: nn.Module, context: TrainingContext) -> None:
        """Put the prefix where the model is."""
        self._layers: Any = model.layers
        self._tokens_1P = torch.tensor([self._prefix], device=context.device)
        if context.first_process:
            log.info(f"PrefixAnchor holds the first {len(self._prefix)} tokens of a conversation")

    def step_term(self, forward: Callable[..., Tensor]) -> Tensor:
        """The term, a scalar."""
        self._read_reference(forward)
        with self._read() as term:
            forward(self._tokens_1P)
        return term()

    def step_term_in_rows(
        self, batch: Batch, forward: Callable[..., Tensor]
    ) -> AbstractContextManager[Callable[[], Tensor]] | None:
        """The same from a micro-batch's first row, where every row begins with the prefix.

        Raises:
            UserCodeError: This one does not: `collate_fn` changed it.
        """
        if not self._in_every_row:
            return None
        if not self._begins(batch):
            raise UserCodeError(
                "every row of the data set begins with the template's prefix, and a row that "
                "collate_fn made does not, or not read from left to right"
            )
        self._read_reference(forward)
        return self._read()

    def figures(self) -> dict[str, float]:
        """How far the prefix has moved, of the last step that the term was in."""
        drift, self._drift = self._drift, None
        return {} if drift is None else {"drift": float(drift)}

    def _read_reference(self, forward: Callable[..., Tensor]) -> None:
        if self._reference is None:
            with self._seeing() as found:
                forward(self._tokens_1P, adapter=False)
            self._reference = found

    def _begins(self, batch: Batch) -> bool:
        """Whether the first row does, as attention sees it."""
        size, mask_BSS = len(self._prefix), batch.inputs.get("mask")
        same = torch.equal(batch.inputs["tokens"][:1, :size], self._tokens_1P)
        if same and isinstance(mask_BSS, Tensor):
            mask_PS = mask_BSS[0, :size]
            same = torch.equal(mask_PS, torch.ones_like(mask_PS).tril())
        return same

    @contextmanager
    def _read(self) -> Iterator[Callable[[], Tensor]]:
        """Around a forward of rows whose first begins with the prefix: what gives its term."""
        with self._seeing() as policy:
            yield lambda: self._term(policy)

    @contextmanager
    def _seeing(self) -> Iterator[list[KeysValues]]:
        """Around a forward: keys and values of each layer, (P, heads * width of a head)."""
        found: list[KeysValues] = []
        # Before the layer, where FSDP2 has its weights whole and checkpointing recomputes nothing.
        hooks = [
            layer.register_forward_pre_hook(partial(self._see, found)) for layer in self._layers
        ]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()

    def _see(self, found: list[KeysValues], layer: Any, inputs: Any) -> None:
        hidden_1PD = inputs[0][:1, : len(self._prefix)]
        if self._stream == "normed":
            hidden_1PD = layer.sa_norm(hidden_1PD)
        found.append((layer.attn.k_proj(hidden_1PD)[0], layer.attn.v_proj(hidden_1PD)[0]))

    def _term(self, policy: list[KeysValues]) -> Tensor:
        assert self._reference is not None
        layers = [
            sum(map(_change, ours, theirs))
            for ours, theirs in zip(policy, self._reference, strict=True)
        ]
        drift = torch.stack(layers).mean()  # type: ignore[arg-type]
        self._drift = drift.detach()
        return (drift - self._threshold).clamp(min=0.0)


def _change(ours_PK: Tensor, theirs_PK: Tensor) -> Tensor:
    """Mean over tokens of |x - y|^2 / |y|^2, in float32."""
    theirs_PK = theirs_PK.float()
    size_P = theirs_PK.square().sum(dim=-1).clamp(min=1e-24)
    change: Tensor = ((ours_PK.float() - theirs_PK).square().sum(dim=-1) / size_P).mean()
    return change
