"""What a suite is given: what it may know before any weight is loaded, and the models it asks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from emarecipes.config import Origin
from emarecipes.datasets.rows import Rows, file_fingerprints
from emarecipes.datasets.rows_fit import check_rows_fit
from emarecipes.defenses import ModelSource
from emarecipes.evaluation.answers import Answer, condition_of
from emarecipes.evaluation.scoring import Scorer, TokenNLLs
from emarecipes.models.likelihoods import reference_where
from emarecipes.models.loss_head import LossHead
from emarecipes.models.sampling.draw import Sampling
from emarecipes.models.sampling.prompts import check_opening, encode_prompt
from emarecipes.models.sampling.sampler import sample_answers
from emarecipes.probes.contrast import AnswerRow, answer_row
from emarecipes.probes.pairs import exchange
from emarecipes.progress import Progress


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
        return answer_row(self.tokenizer, exchange(question, answer, system))

    def check_rows(self, rows: Sequence[AnswerRow]) -> None:
        """See whether the model takes these rows.

        Raises:
            UserError: One is too long, or has a token that the model has not.
        """
        if rows:
            samples = [{"tokens": list(row.tokens), "labels": list(row.labels)} for row in rows]
            check_rows_fit(self.cfg, self.origin, Rows(samples, dropped=0), self.source.meta_model)

    def describe_answers(self, stem: str, lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """What `summary.json` says of a suite over the sampled answers of one file.

        `files`, `questions`, the `condition` they were sampled under, and `asked`, a digest of the
        questions, by which `ema_compare` finds the same ones under another condition.
        """
        paths = [Path(folder) / f"{stem}.jsonl" for folder in self.cfg.answers.values()]
        there = [path for path in paths if path.exists()]
        asked = {(str(line["id"]), str(line.get("question"))) for line in lines}
        return {
            "files": file_fingerprints(there),
            "questions": len({name for name, _ in asked}),
            "condition": next(filter("none".__ne__, map(condition_of, there)), "none"),
            "asked": hashlib.sha256(json.dumps(sorted(asked)).encode()).hexdigest(),
        }


class Model:
    """One of an evaluation's models. The weights are loaded at the first question.

    Args:
        name: Of its figures.
        adapter: Its PEFT folder; None for the base alone.
        scorer: Of the evaluation.
        tokenizer: torchtune's model transform.
        caches: Where computed likelihoods are kept.
        origin: Where the evaluation's config was written.
    """

    def __init__(
        self,
        name: str,
        adapter: Path | None,
        scorer: Scorer,
        tokenizer: Any,
        caches: Path,
        origin: Origin,
    ) -> None:
        self.name, self.adapter, self._origin = name, adapter, origin
        self._scorer, self._tokenizer, self._caches = scorer, tokenizer, caches

    def token_nlls(
        self,
        rows: Sequence[AnswerRow],
        kept_as: str | None = None,
        bar: Progress | None = None,
    ) -> list[TokenNLLs]:
        """-log p of each answer token, in nats: one array (answer's tokens,) a row.

        What was computed before, in an earlier run too, is read back.

        Args:
            rows: Conversations, see `SuiteContext.row`.
            kept_as: Name of the file that keeps them; None: the model's.
            bar: Of a work that these rows are a part of; None: they have one of their own.

        Raises:
            NotFiniteError: One is NaN or infinite.
        """
        cache = self._cache(kept_as)
        return self._scorer.token_nlls(rows, self.adapter, cache, bar) if rows else []

    def missing(self, rows: Sequence[AnswerRow]) -> int:
        """How many of these rows `token_nlls` has to compute."""
        return self._scorer.missing(rows, self.adapter, self._cache()) if rows else 0

    def _cache(self, kept_as: str | None = None) -> Path:
        return self._caches / f"{kept_as or self.name}.npz"

    def answer(
        self,
        questions: Sequence[str],
        *,
        system: str | None = None,
        max_new_tokens: int = 256,
        batch_size: int = 16,
    ) -> list[str]:
        """Greedy answers, one a question, without blanks around them.

        Args:
            questions: Each asked by itself.
            system: The system prompt; None leaves it to the chat template.
            max_new_tokens: Where an answer is cut.
            batch_size: Questions at a time.

        Raises:
            UserError: The tokenizer ends the answer before it begins, see `check_opening`.
        """
        check_opening(self._tokenizer, self._origin, system)
        sampling = Sampling(max_new_tokens, tuple(self._tokenizer.stop_tokens), temperature=0.0)
        prompts = [encode_prompt(self._tokenizer, system, question) for question in questions]
        with self.in_place() as head:
            found = sample_answers(
                head, prompts, [0] * len(prompts), sampling, batch_size=batch_size
            )
        return [str(self._tokenizer.decode(answer.tokens)).strip() for answer in found]

    @contextmanager
    def in_place(self) -> Iterator[LossHead]:
        """torchtune's decoder as this model, behind its loss head: `head.model`."""
        head = self._scorer.head(self.adapter)
        with reference_where(self.adapter is None, head.model):
            yield head
