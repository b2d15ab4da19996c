"""What of a data set is not trained: told before hours are spent on the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torchtune import utils
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

if TYPE_CHECKING:
    from emarecipes.datasets.rows import Rows

log = utils.get_logger("INFO")

# Templates may write a line break behind the stop token, which train_on_input trains too.
_LAST = 3


@dataclass
class Ends:
    """How the conversations of a data set's rows end.

    Attributes:
        conversations: All of them: a row is one, a pack holds several.
        unlabelled: Those within packs that have no label. (Rows without one are dropped before.)
        cut: Those that `max_seq_len` cut within an answer.
        unended: Others that do not end with a stop token.
    """

    conversations: int = 0
    unlabelled: int = 0
    cut: int = 0
    unended: int = 0


def count_ends(samples: Sequence[dict[str, Any]], tokenizer: Any) -> Ends:
    """How many conversations are cut, and how many of the others do not end.

    One ends where one of its last labels is a stop token. It is cut where it fills `max_seq_len`
    with a label at its end. Else the chat template closes no answer (it opens the next turn
    instead), or the tokenizer masks what does: of such rows nobody learns to stop.

    Args:
        samples: Rows or packs with labels, each with at least one, in the data set's order.
        tokenizer: torchtune's model transform; of one without `stop_tokens` no end is judged.
    """
    stops = list(getattr(tokenizer, "stop_tokens", None) or ())
    limit = getattr(tokenizer, "max_seq_len", None)
    ends = Ends()
    for labels in _conversations(samples):
        ends.conversations += 1
        last = labels[labels != CROSS_ENTROPY_IGNORE_IDX][-_LAST:]
        if not len(last):
            ends.unlabelled += 1
        elif stops and not np.isin(last, stops).any():
            # torchtune's text_completion_dataset cuts one token before the limit.
            fills = limit is not None and len(labels) >= limit - 1
            is_cut = fills and labels[-1] != CROSS_ENTROPY_IGNORE_IDX
            ends.cut, ends.unended = ends.cut + int(is_cut), ends.unended + int(not is_cut)
    return ends


def _conversations(samples: Sequence[dict[str, Any]]) -> Iterator[NDArray[Any]]:
    """Labels of each conversation, whole where `split_across_pack` put its rest into the next."""
    waiting: NDArray[Any] | None = None
    for sample in samples:
        labels = np.asarray(sample["labels"])
        if "seq_lens" not in sample:
            yield labels
            continue
        starts = np.cumsum([0, *np.asarray(sample["seq_lens"])])
        parts = [labels[a:b] for a, b in pairwise(starts)]
        # torchtune pads with one more part, whose positions go on from the one before it.
        if len(parts) > 1 and int(np.asarray(sample["input_pos"])[starts[-2]]) != 0:
            parts.pop()
        if waiting is not None and int(np.asarray(sample["input_pos"])[0]) != 0:
            parts[0] = np.concatenate([waiting, parts[0]])
        elif waiting is not None:
            yield waiting
        yield from parts[:-1]
        waiting = parts[-1]
    if waiting is not None:
        yield waiting


def tell_losses(rows: Rows, where: str) -> None:
    """Say what part of a data set is not trained, or not to its end.

    Args:
        rows: The rows.
        where: The data set's place in the config.
    """
    what = "packed conversations" if rows.packed else "rows"
    total = rows.ends.conversations + rows.dropped
    told = {
        "have no label left (tokenizer.max_seq_len) and are dropped": rows.dropped,
        "have no label left (tokenizer.max_seq_len) and only take time": rows.ends.unlabelled,
        "are cut at tokenizer.max_seq_len: the end of their answers is not trained": rows.ends.cut,
        "end without a stop token, as the chat template closes no answer: stopping is not learned "
        "from them": rows.ends.unended,
    }
    for how, count in told.items():
        if count:
            log.warning(f"{where}: {count} of {total} {what} {how}")
