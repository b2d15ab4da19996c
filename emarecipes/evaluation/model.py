"""What a suite asks: the base with one adapter in place, or alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torchtune.modules.peft import disable_adapter

from emarecipes.config import Origin
from emarecipes.evaluation.scoring import Scorer, TokenNLLs
from emarecipes.models.loss_head import LossHead
from emarecipes.models.sampling.draw import Sampling
from emarecipes.models.sampling.prompts import check_opening, encode_prompt
from emarecipes.models.sampling.sampler import sample_answers
from emarecipes.probes.contrast import AnswerRow


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

    def token_nlls(self, rows: Sequence[AnswerRow], kept_as: str | None = None) -> list[TokenNLLs]:
        """-log p of each answer token, in nats: one array (answer's tokens,) a row.

        What was computed before, in an earlier run too, is read back.

        Args:
            rows: Conversations, see `SuiteContext.row`.
            kept_as: Name of the file that keeps them; None: the model's.

        Raises:
            NotFiniteError: One is NaN or infinite.
        """
        cache = self._caches / f"{kept_as or self.name}.npz"
        return self._scorer.token_nlls(rows, self.adapter, cache) if rows else []

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
        with disable_adapter(head.model) if self.adapter is None else nullcontext():
            yield head
