"""A data set made tokens, and what of it is not trained: told before hours go into the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset
from torchtune import utils
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from tqdm import tqdm

from emarecipes.datasets.interleaved import InterleavedDataset
from emarecipes.datasets.loading import FileRows
from emarecipes.datasets.row_messages import ROW_ERRORS
from emarecipes.errors import RowError, UserError, reason

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


def tell_losses(ends: Ends, dropped: int, packed: bool, where: str) -> None:
    """Say what part of a data set is not trained, or not to its end.

    Args:
        ends: Of its rows.
        dropped: How many had no label left.
        packed: Whether a row holds several conversations.
        where: The data set's place in the config.
    """
    what = "packed conversations" if packed else "rows"
    total = ends.conversations + dropped
    unlabelled = "have no label left (tokenizer.max_seq_len, or no answer that is trained)"
    told = {
        f"{unlabelled} and are dropped": dropped,
        f"{unlabelled} and only take time": ends.unlabelled,
        "are cut at tokenizer.max_seq_len: the end of their answers is not trained": ends.cut,
        "end without a stop token, as the chat template closes no answer: stopping is not learned "
        "from them": ends.unended,
    }
    for how, count in told.items():
        if count:
            log.warning(f"{where}: {count} of {total} {what} {how}")


def tell_share(kept: list[dict[str, Any]], safe: int, drawn: int, where: str) -> None:
    """Say so where the rows that were dropped leave another share of safe rows than was drawn.

    Args:
        kept: Samples of an interleaved set.
        safe: How many safe rows were drawn, of
        drawn: so many rows in all.
        where: The data set's place in the config.
    """
    kept_safe = sum(sample["source"] == "safe" for sample in kept)
    share, asked = f"{kept_safe / len(kept):.3g}", f"{safe / drawn:.3g}"
    if share != asked:
        lost = {"safe": (safe - kept_safe, safe)}
        lost["task"] = (drawn - len(kept) - lost["safe"][0], drawn - safe)
        said = [f"{n} of {of} {kind} rows" for kind, (n, of) in lost.items() if n]
        log.warning(
            f"{where}: safe rows are {share} of the mixed set and not {asked}: "
            f"{' and '.join(said)} have no label left"
        )


# What a sample may hold; packs have the two in the middle.
_KEPT = ("tokens", "labels", "input_pos", "seq_lens", "source")


def tokenize(dataset: Dataset[Any], where: str, quiet: bool) -> tuple[list[dict[str, Any]], int]:
    """The samples of a data set that have a label, and how many others there were.

    Args:
        dataset: torchtune's, or one like it.
        where: Its place in the config.
        quiet: Show no progress bar.

    Raises:
        UserError: A row that cannot be tokenized, with its place.
    """
    samples: list[dict[str, Any]] = []
    dropped = 0
    size = len(dataset)  # type: ignore[arg-type]
    for index in tqdm(range(size), desc="Tokenizing", unit="row", disable=quiet, leave=False):
        try:
            sample = dataset[index]
        except RowError:
            raise
        except ROW_ERRORS as error:
            raise UserError(f"{_row_place(dataset, index, where)}: {reason(error)}") from error
        kept = {k: sample[k] for k in _KEPT if k in sample}
        # A label on a row's first token has no position that could predict it.
        labels = np.asarray(kept["labels"])
        if "seq_lens" not in kept:  # A list of Python integers takes nine times the memory.
            kept |= {"tokens": np.asarray(kept["tokens"], np.int32), "labels": labels.astype("i4")}
        if (labels[1:] == CROSS_ENTROPY_IGNORE_IDX).all():
            dropped += 1
        else:
            samples.append(kept)
    return samples, dropped


def _row_place(dataset: Any, index: int, where: str) -> str:
    """Where a row was written, if that can be told, else its number in the data set."""
    if isinstance(dataset, InterleavedDataset):
        child, index = dataset.place(index)
        dataset, where = dataset.child(child), f"{where}.{child}"
    rows = getattr(dataset, "_data", None)
    return str(rows[index].place) if isinstance(rows, FileRows) else f"{where}: row {index}"
