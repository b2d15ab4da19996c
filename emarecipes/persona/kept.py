"""Which sampled answers make the vector: by likelihood, or by a judge's grades, as published.

Shapes: N answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from emarecipes.judges.calls import fill, grade
from emarecipes.persona.prompts import PersonaPrompts
from emarecipes.progress import Progress

# The published thresholds.
TRAIT, COHERENCE = 50.0, 50.0

CALLS_AN_ANSWER = 2


@dataclass(frozen=True)
class Grades:
    """What the judge made of one answer: 0 to 100, or None where its reply was no score."""

    trait: float | None
    coherence: float | None

    def keep(self, side: str) -> bool:
        """Coherence >= 50, and trait >= 50 on the positive side, < 50 on the negative one.

        An answer that lacks a grade is not kept.

        Source: Chen et al., 2025, "Persona Vectors: Monitoring and Controlling Character Traits in
        Language Models".
        """
        if self.trait is None or self.coherence is None or self.coherence < COHERENCE:
            return False
        return self.trait >= TRAIT if side == "positive" else self.trait < TRAIT


def grade_answers(
    judge: str, prompts: PersonaPrompts, texts: Sequence[tuple[str, str]]
) -> list[Grades]:
    """Ask the judge twice about each answer; say before how many calls these are.

    Args:
        judge: An Inspect provider string.
        prompts: With both judge prompts.
        texts: Question and answer.

    Raises:
        UserError: A call failed for good.
    """
    assert prompts.judge_prompt is not None and prompts.coherence_prompt is not None
    calls = CALLS_AN_ANSWER * len(texts)
    print(f"Judge {judge}: {calls} calls, 2 for each of {len(texts)} answers", flush=True)
    filled = [
        fill(template, question, answer)
        for template in (prompts.judge_prompt, prompts.coherence_prompt)
        for question, answer in texts
    ]
    with Progress(total=calls, unit="call", desc="judging") as bar:
        scores = grade(judge, filled, progress=bar.update)
    if unparsable := scores.count(None):
        print(f"{unparsable} of {calls} replies are no score; their answers are not kept")
    pairs = zip(scores[: len(texts)], scores[len(texts) :], strict=True)
    return [Grades(trait, coherence) for trait, coherence in pairs]


def kept(log_likelihood_N: Tensor, opposite_N: Tensor, keep: str) -> Tensor:
    """Which answers took their system prompt up, boolean (N,).

    Args:
        log_likelihood_N: Mean token log-likelihood under the system prompt that gave the answer.
        opposite_N: The same answer's under the opposite prompt of its pair.
        keep: "likelihood": where the first is higher. "all": everywhere.
    """
    if keep == "all":
        return torch.ones_like(log_likelihood_N, dtype=torch.bool)
    return log_likelihood_N > opposite_N


@dataclass
class SideAnswer:
    """One sampled answer, as in `answers.jsonl`."""

    pair: int
    side: Literal["positive", "negative"]
    question: int
    sample: int
    held_out: bool
    tokens: list[int]
    stopped: bool
    log_likelihood: float = float("nan")
    opposite_log_likelihood: float = float("nan")
    kept: bool = False
    grades: Grades | None = None


def keep_whole_pairs(answers: list[SideAnswer]) -> None:
    """Keep an answer only if its counterpart is kept: same question and sample, other prompt.

    As the published pipeline does (Chen et al., 2025): both sides of a vector are then means over
    the same questions. An answer whose counterpart is empty is not kept.
    """
    sides = Counter((a.pair, a.question, a.sample) for a in answers if a.kept)
    for answer in answers:
        answer.kept &= sides[answer.pair, answer.question, answer.sample] == 2  # Its sides.
