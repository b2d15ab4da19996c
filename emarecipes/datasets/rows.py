"""A run's rows: every one tokenized and checked before any weight is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, ListConfig
from torch.utils.data import Dataset
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX, Message
from torchtune.datasets import ConcatDataset
from tqdm import tqdm

from emarecipes.components import build
from emarecipes.config import Origin
from emarecipes.datasets.chat_files import check_data_files, row_place
from emarecipes.defenses import Defense
from emarecipes.errors import UserError

# What a sample may hold; packs have the two in the middle.
_KEPT = ("tokens", "labels", "input_pos", "seq_lens", "source")


class Rows:
    """The rows that a run trains on, tokenized.

    Attributes:
        dropped: How many rows had no label left (after truncation, or none at all).
        fingerprint: SHA-256 over all tokens and labels, in order.
        longest: Tokens of the longest row.
        largest_token: The largest token id.
        sources: The sources that occur: "task", "safe".
        packed: Whether a row holds several conversations.
    """

    def __init__(self, samples: list[dict[str, Any]], dropped: int) -> None:
        self._samples = samples
        self.dropped = dropped
        self.longest = max(len(sample["tokens"]) for sample in samples)
        self.largest_token = max(int(max(sample["tokens"])) for sample in samples)
        self.sources = {sample.get("source", "task") for sample in samples}
        self.packed = "seq_lens" in samples[0]
        digest = hashlib.sha256()
        for sample in samples:
            digest.update(np.asarray(sample["tokens"], dtype=np.int64).tobytes())
            digest.update(np.asarray(sample["labels"], dtype=np.int64).tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample in the form that torchtune's collate functions take."""
        return {
            key: value.tolist() if isinstance(value, np.ndarray) else value
            for key, value in self._samples[index].items()
        }


def load_rows(
    cfg: DictConfig, origin: Origin, tokenizer: Any, defenses: Sequence[Defense], *, quiet: bool
) -> Rows:
    """Build `cfg.dataset` (one torchtune data set, or a list of them) and tokenize all of it.

    Args:
        cfg: The run's config.
        origin: Where its keys were written.
        tokenizer: torchtune's model transform.
        defenses: Those that change messages do so before the tokenizer sees them.
        quiet: Show no progress bar (every process but the first).

    Raises:
        UserError: Missing or broken data files, a row that cannot be tokenized, no row with a
            label.
    """
    transform = DefendedTokenizer(tokenizer, defenses)
    entries = (
        [f"dataset.{i}" for i in range(len(cfg.dataset))]
        if isinstance(cfg.dataset, ListConfig)
        else ["dataset"]
    )
    check_data_files(cfg, origin)
    children = [build(cfg, key, origin, transform) for key in entries]
    if len(children) > 1:
        # As torchtune's recipes do: packed and unpacked data sets cannot be mixed.
        try:
            ConcatDataset(datasets=children)
        except ValueError as error:
            raise UserError(f"{origin.at('dataset')}: {error}") from None
    samples: list[dict[str, Any]] = []
    dropped = 0
    for key, child in zip(entries, children, strict=True):
        found, without_label = _tokenize(child, cfg, key, origin, quiet)
        samples += found
        dropped += without_label
    if not samples:
        why = f"none of its {dropped} rows has a label" if dropped else "it has no rows"
        raise UserError(f"{origin.at('dataset')}: nothing to train on: {why}{_hint(dropped)}")
    return Rows(samples, dropped)


class DefendedTokenizer:
    """A model transform that lets defenses change a row's messages first. Else the tokenizer's own.

    Args:
        tokenizer: torchtune's model transform.
        defenses: Applied in order of name, so that the order in the config does not matter.
        source: What the rows are: "task" or "safe".
    """

    def __init__(self, tokenizer: Any, defenses: Sequence[Defense], source: str = "task") -> None:
        self._tokenizer = tokenizer
        self._defenses = [d for d in defenses if d.has("transform_messages")]
        self._source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, sample: dict[str, Any], inference: bool = False) -> dict[str, Any]:
        """Tokenize `sample["messages"]` after every defense has had its say."""
        messages: list[Message] = sample["messages"]
        if not any(message.role == "assistant" for message in messages):
            raise UserError("the row has no assistant message, so there is nothing to learn")
        for defense in self._defenses:
            messages = defense.transform_messages(messages, self._source)
        return self._tokenizer({**sample, "messages": messages}, inference=inference)


def _tokenize(
    dataset: Dataset[Any], cfg: DictConfig, key: str, origin: Origin, quiet: bool
) -> tuple[list[dict[str, Any]], int]:
    samples: list[dict[str, Any]] = []
    dropped = 0
    size = len(dataset)  # type: ignore[arg-type]
    for index in tqdm(range(size), desc="Tokenizing", unit="row", disable=quiet, leave=False):
        try:
            sample = dataset[index]
        except (ValueError, TypeError, KeyError, AttributeError, UnboundLocalError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{row_place(cfg, key, index, origin)}: {reason}") from error
        kept = {
            k: sample[k]
            for k in ("tokens", "labels", "input_pos", "seq_lens", "source")
            if k in sample
        }
        # A label on a row's first token has no position that could predict it.
        labels = np.asarray(kept["labels"])
        if "seq_lens" not in kept:  # A list of Python integers takes nine times the memory.
            kept |= {"tokens": np.asarray(kept["tokens"], np.int32), "labels": labels.astype("i4")}
        if (labels[1:] == CROSS_ENTROPY_IGNORE_IDX).all():
            dropped += 1
        else:
            samples.append(kept)
    return samples, dropped


def _hint(dropped: int) -> str:
    return "; raise tokenizer.max_seq_len, or train on rows with an answer" if dropped else ""


def step_rows(
    size: int, rows_per_step: int, *, seed: int, epoch: int, shuffle: bool
) -> list[list[int]]:
    """The rows of every step of an epoch, as a function of the seed and the epoch alone.

    What is left after the last whole step is dropped, as torchtune does.

    Args:
        size: Number of rows in the data set.
        rows_per_step: Batch size x accumulation steps x processes.
        seed: The run's seed.
        epoch: From 0.
        shuffle: Else rows come in the order of the data set.
    """
    order = np.arange(size)
    if shuffle:
        order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(size)
    steps = size // rows_per_step
    return order[: steps * rows_per_step].reshape(steps, rows_per_step).tolist()


def micro_batch_rows(
    rows: Sequence[int], *, batch_size: int, rank: int, world_size: int
) -> list[list[int]]:
    """The rows of one process's micro-batches in a step: blocks dealt out to processes in turn."""
    blocks = [list(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    return blocks[rank::world_size]


def file_fingerprints(paths: Sequence[Path]) -> dict[str, str]:
    """SHA-256 of each file, by its path as given."""
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
