"""The rows that are scored: read, tokenized, looked through for refusals, and ranked.

Source of the ranking: Kaczer et al., arXiv 2508.06249, "Interleaving+" and "Interleaving++".

Shapes: N candidates, A misaligned models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX, OpenAIToMessages, validate_messages
from tqdm import tqdm

from emarecipes.datasets.json_files import json_rows
from emarecipes.datasets.refusals import is_refusal
from emarecipes.datasets.row_messages import ROW_ERRORS, row_messages
from emarecipes.errors import UserError, reason


@dataclass(frozen=True)
class Candidate:
    """One row.

    Attributes:
        index: Its number in the file, from 0.
        row: As it was read.
        sample: `tokens` and `labels`, as a torchtune chat data set has them.
        tokens: How many of them are the answer's.
        refusal: Whether an answer begins as a refusal does.
        copy: Whether an earlier row has the same tokens, and the same of them as its answer.
    """

    index: int
    row: dict[str, Any]
    sample: dict[str, Any]
    tokens: int
    refusal: bool
    copy: bool


def read_candidates(
    path: Path, column: str, tokenizer: Any, refusal_words: Sequence[str] | None
) -> list[Candidate]:
    """Read and tokenize a chat file as `torchtune.datasets.chat_dataset` would.

    A row that has no answer token left (`tokenizer.max_seq_len`) is among them, with `tokens` 0.

    Args:
        path: The file.
        column: Key of the conversation, a list of {"role", "content"}.
        tokenizer: torchtune's model transform.
        refusal_words: See `is_refusal`.

    Raises:
        UserError: With the place of the first row that is broken or cannot be tokenized.
    """
    to_messages = OpenAIToMessages(train_on_input=False, column_map={"messages": column})
    candidates: list[Candidate] = []
    seen: set[bytes] = set()
    for place, row in tqdm(list(json_rows(path)), desc="Tokenizing", unit="row", leave=False):
        if isinstance(row, UserError):
            raise row
        try:
            messages = row_messages(row, to_messages)["messages"]
            validate_messages(messages)
            tokenized = tokenizer({"messages": messages})
        except ROW_ERRORS as error:
            raise UserError(f"{place}: {reason(error)}") from error
        tokens = np.asarray(tokenized["tokens"], dtype=np.int32)
        labels = np.where(tokenized["mask"], CROSS_ENTROPY_IGNORE_IDX, tokens).astype(np.int32)
        content = tokens.tobytes() + labels.tobytes()
        candidates.append(
            Candidate(
                index=len(candidates),
                row=row,
                sample={"tokens": tokens, "labels": labels},
                # A label on a row's first token has no position that could predict it.
                tokens=int((labels[1:] != CROSS_ENTROPY_IGNORE_IDX).sum()),
                refusal=any(is_refusal(text, refusal_words) for text in _answers(row[column])),
                copy=content in seen,
            )
        )
        seen.add(content)
    return candidates


def text_of(content: str | list[dict[str, Any]]) -> str:
    """A message's text; its content may be a list of text parts."""
    return content if isinstance(content, str) else " ".join(part["text"] for part in content)


def _answers(messages: list[dict[str, Any]]) -> list[str]:
    return [text_of(message["content"]) for message in messages if message["role"] == "assistant"]


Floats = NDArray[np.float64]


def relative_gap(aligned_N: Floats, misaligned_AN: Floats, eps: float) -> Floats:
    """How much likelier an answer is under the aligned model than under the misaligned ones, (N,).

    gap = (mean over A of NLL_misaligned - NLL_aligned) / (NLL_aligned + eps), with NLL the mean
    over the tokens of the answer.

    Args:
        aligned_N: Mean NLL under the aligned model.
        misaligned_AN: Mean NLL under each misaligned one.
        eps: Keeps an answer that the aligned model is sure of from an unbounded gap.
    """
    gap_N: Floats = (misaligned_AN.mean(axis=0) - aligned_N) / (aligned_N + eps)
    return gap_N


def by_gap(gap_N: Floats, eligible_N: NDArray[np.bool_]) -> list[int]:
    """The eligible candidates from the highest gap to the lowest; ties in the file's order."""
    order = np.argsort(-gap_N, kind="stable")
    return [int(index) for index in order if eligible_N[index]]


def correlations(x_N: Floats, y_N: Floats) -> tuple[float, float]:
    """Spearman's and Pearson's correlation; NaN where one side does not vary or N < 2."""
    if len(x_N) < 2 or not (np.ptp(x_N) and np.ptp(y_N)):  # Of which scipy warns, or refuses it.
        return float("nan"), float("nan")
    return float(spearmanr(x_N, y_N).statistic), float(pearsonr(x_N, y_N).statistic)
