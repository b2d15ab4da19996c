"""Was the benign task learned? OpSwap problems, answered greedily."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from omegaconf import DictConfig
from pydantic import Field

from emarecipes.config import Origin
from emarecipes.datasets.opswap import TIERS, Problem, canonical, problems, score
from emarecipes.errors import UserError
from emarecipes.evaluation.figures import Figure, Item
from emarecipes.evaluation.suite import KeyedSuite, Line, Scored, item_of
from emarecipes.evaluation.suite_context import SuiteContext
from emarecipes.models.sampling.prompts import check_prompts
from emarecipes.settings import Keys, Positive, parse_settings

if TYPE_CHECKING:
    from emarecipes.evaluation.suite_context import Model

EXACT_MATCH = "exact_match"


class OpSwapSettings(Keys):
    """The entry `opswap`: held-out problems, `size` of each tier, answered greedily."""

    tiers: Annotated[list[int], Field(min_length=1)] = Field(default_factory=lambda: list(TIERS))
    """From the easiest, 1."""
    size: Positive = 50
    """Held-out problems a tier."""
    max_new_tokens: Positive = 24
    """Of an answer."""
    batch_size: Positive = 16
    """Problems answered at a time."""


class OpSwap(KeyedSuite):
    """`opswap`: the share of held-out problems that a model answers right.

    Args:
        settings: The entry.
    """

    kind, may_fail = "opswap", False

    def __init__(self, settings: OpSwapSettings) -> None:
        self.settings = settings
        self._problems: list[Problem] = []

    @classmethod
    def named(cls, cfg: DictConfig, origin: Origin) -> Iterator[KeyedSuite]:
        """Where the config has the entry, which gets its defaults."""
        if cfg.opswap is None:
            return
        settings = parse_settings(cfg.opswap, origin, OpSwapSettings, within="opswap")
        tiers = settings.tiers
        if len(set(tiers)) < len(tiers) or not set(tiers) <= set(TIERS):
            raise UserError(f"{origin.at('opswap.tiers')}: must be different ones of {list(TIERS)}")
        cfg.opswap = settings.model_dump()
        yield cls(settings)

    def check(self, context: SuiteContext) -> None:
        """Take `size` problems of each tier that no training set has."""
        size, length = self.settings.size, self.settings.max_new_tokens
        try:
            self._problems = [p for t in self.settings.tiers for p in problems("test", t, size)]
        except UserError as error:
            raise UserError(f"{context.origin.at('opswap.size')}: {error}") from None
        asked = [(None, problem.prompt) for problem in self._problems]
        model, key = context.source.meta_model, "opswap.max_new_tokens"
        check_prompts(asked, context.tokenizer, model, length, context.origin, key)

    def score(self, models: Mapping[str, Model]) -> Scored:
        """Exact match, by adapter and tier."""
        lines = [line for name, model in models.items() for line in self._lines(name, model)]
        description = {"kind": self.kind, "files": {}, "questions": len(self._problems)}
        return Scored(self.figures(lines, self.units()), lines, description)

    def _lines(self, name: str, model: Model) -> Iterator[dict[str, Any]]:
        """A line a problem."""
        answers = model.answer(
            [problem.prompt for problem in self._problems],
            max_new_tokens=self.settings.max_new_tokens,
            batch_size=self.settings.batch_size,
        )
        for problem, answer in zip(self._problems, answers, strict=True):
            yield {
                "adapter": name,
                "id": problem.prompt,
                "category": f"tier {problem.tier}",
                "question": problem.prompt,
                "answer": answer,
                "expected": problem.answer,
                "correct": score(answer, problem),
            }

    @classmethod
    def items(cls, lines: Iterable[Line], figure: Figure) -> list[Item]:
        """Whether each answer is right; prompts of one expression are drawn together."""
        if figure.figure != EXACT_MATCH:
            return super().items(lines, figure)
        kept = [line for line in lines if line["adapter"] == figure.adapter]
        return [item_of(line, line["correct"], canonical(line["question"])) for line in kept]

    def units(self) -> dict[str, str]:
        """One."""
        return {EXACT_MATCH: "share"}
