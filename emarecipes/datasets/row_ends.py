"""What of a data set is not trained: told before hours are spent on the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torchtune import utils
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

if TYPE_CHECKING:
    from emarecipes.datasets.rows import Rows

log = utils.get_logger("INFO")

# Templates may write a line break behind the stop token, which train_on_input trains too.
_LAST = 3


def count_ends(samples: Sequence[dict[str, Any]], tokenizer: Any) -> tuple[int, int]:
    """How many rows are cut, and how many of the others do not end.

    A row ends where one of its last labels is a stop token. It is cut where it fills `max_seq_len`
    with a label at its end. Else the chat template closes no answer (it opens the next turn
    instead), or the tokenizer masks what does: of such rows nobody learns to stop.

    Args:
        samples: Rows with labels, each with at least one. Packs are left alone.
        tokenizer: torchtune's model transform; one without `stop_tokens` cannot be judged.
    """
    stops = list(getattr(tokenizer, "stop_tokens", None) or ())
    limit = getattr(tokenizer, "max_seq_len", None)
    cut = unended = 0
    for sample in samples if stops and "seq_lens" not in samples[0] else ():
        labels = np.asarray(sample["labels"])
        last = labels[labels != CROSS_ENTROPY_IGNORE_IDX][-_LAST:]
        if np.isin(last, stops).any():
            continue
        fills = limit is not None and len(labels) >= limit
        is_cut = fills and labels[-1] != CROSS_ENTROPY_IGNORE_IDX
        cut, unended = cut + int(is_cut), unended + int(not is_cut)
    return cut, unended


def tell_losses(rows: Rows, where: str) -> None:
    """Say what part of a data set's rows is not trained, or not to its end.

    Args:
        rows: The rows.
        where: The data set's place in the config.
    """
    told = {
        "have no label left (tokenizer.max_seq_len) and are dropped": rows.dropped,
        "are cut at tokenizer.max_seq_len: the end of their answers is not trained": rows.cut,
        "end without a stop token, as the chat template closes no answer: stopping is not learned "
        "from them": rows.unended,
    }
    for what, count in told.items():
        if count:
            log.warning(f"{where}: {count} of {len(rows) + rows.dropped} rows {what}")
