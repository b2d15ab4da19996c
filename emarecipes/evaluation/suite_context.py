"""What a suite may know before any weight is loaded, and how it makes rows to be scored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX, Message

from emarecipes.config import Origin
from emarecipes.datasets.rows import Rows, file_fingerprints
from emarecipes.datasets.rows_fit import check_rows_fit
from emarecipes.defenses import ModelSource
from emarecipes.errors import UserError
from emarecipes.evaluation.answers import Answer
from emarecipes.probes.contrast import AnswerRow


@dataclass(frozen=True)
class SuiteContext:
    """What a suite may know before any weight is loaded.

    Attributes:
        cfg: The evaluation's config, checked.
        origin: Where it was written.
        source: The model without weights, and the folder of its base.
        tokenizer: torchtune's model transform.
        answers: The sampled answers that `answers` names, by adapter and by their file's stem.
    """

    cfg: DictConfig
    origin: Origin
    source: ModelSource
    tokenizer: Any
    answers: Mapping[str, Mapping[str, Sequence[Answer]]]

    def row(self, question: str, answer: str, system: str | None = None) -> AnswerRow:
        """A conversation for `Suite.rows`: its tokens, with the answer's as labels.

        Raises:
            UserError: It does not fit into the tokenizer's `max_seq_len`.
        """
        return answer_row(self.tokenizer, question, answer, system)

    def check_rows(self, rows: Sequence[AnswerRow]) -> None:
        """See whether the model takes these rows.

        Raises:
            UserError: One is too long, or has a token that the model has not.
        """
        if rows:
            samples = [{"tokens": list(row.tokens), "labels": list(row.labels)} for row in rows]
            check_rows_fit(self.cfg, self.origin, Rows(samples, dropped=0), self.source.meta_model)

    def describe_answers(self, stem: str, lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """`files` and `questions` of a suite over the sampled answers of one file."""
        paths = [Path(folder) / f"{stem}.jsonl" for folder in self.cfg.answers.values()]
        return {
            "files": file_fingerprints([path for path in paths if path.exists()]),
            "questions": len({line["id"] for line in lines}),
        }


def answer_row(tokenizer: Any, question: str, answer: str, system: str | None) -> AnswerRow:
    """Tokens of a conversation, and labels where they are the answer's, its closing token too.

    Raises:
        UserError: The tokenizer refuses it, or it fills `max_seq_len`, so that it may be cut.
    """
    messages = [] if system is None else [Message("system", system, masked=True)]
    messages += [
        Message("user", question, masked=True),
        Message("assistant", answer, masked=False),
    ]
    try:
        sample = tokenizer({"messages": messages})
    except ValueError as error:
        raise UserError(str(error).splitlines()[0]) from error
    tokens, limit = list(sample["tokens"]), tokenizer.max_seq_len
    if limit is not None and len(tokens) >= limit:
        raise UserError(
            f"the conversation does not fit into {limit} tokens; raise tokenizer.max_seq_len"
        )
    labels = np.where(sample["mask"], CROSS_ENTROPY_IGNORE_IDX, tokens).tolist()
    return AnswerRow(tuple(tokens), tuple(labels))
