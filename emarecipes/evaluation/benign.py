"""Was the benign task learned? OpSwap problems, answered greedily."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from emarecipes.datasets.opswap import Problem, canonical, problems, score
from emarecipes.evaluation.figures import Figure, Item, make_figures
from emarecipes.evaluation.settings import OPSWAP
from emarecipes.models.likelihoods import reference_where
from emarecipes.models.loss_head import LossHead
from emarecipes.models.sampling.draw import Sampling
from emarecipes.models.sampling.prompts import encode_prompt
from emarecipes.models.sampling.sampler import sample_answers


def held_out_problems(cfg: DictConfig) -> list[Problem]:
    """`size` problems of each tier that no training set has.

    Raises:
        UserError: More problems than a tier has.
    """
    return [p for tier in cfg.tiers for p in problems("test", tier, cfg.size)]


def answer_problems(
    head: LossHead, rows: Sequence[Problem], tokenizer: Any, cfg: DictConfig, *, reference: bool
) -> list[str]:
    """The model's greedy answers.

    Args:
        head: Of the model, its adapter in place.
        rows: The problems.
        tokenizer: torchtune's model transform.
        cfg: The checked entry `opswap`.
        reference: Whether the adapter is to be off.
    """
    sampling = Sampling(cfg.max_new_tokens, tuple(tokenizer.stop_tokens), temperature=0.0)
    prompts = [encode_prompt(tokenizer, None, problem.prompt) for problem in rows]
    with reference_where(reference, head.model):
        completions = sample_answers(
            head, prompts, [0] * len(rows), sampling, batch_size=cfg.batch_size
        )
    return [str(tokenizer.decode(completion.tokens)).strip() for completion in completions]


def opswap_lines(rows: Sequence[Problem], answers: Mapping[str, Sequence[str]]) -> Iterator[Any]:
    """A line a problem and adapter for `scores/opswap.jsonl`."""
    for adapter, found in answers.items():
        for problem, answer in zip(rows, found, strict=True):
            yield {
                "adapter": adapter,
                "id": problem.prompt,
                "category": f"tier {problem.tier}",
                "question": problem.prompt,
                "answer": answer,
                "expected": problem.answer,
                "correct": score(answer, problem),
            }


def opswap_figures(lines: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Exact match, by adapter and tier; prompts of one expression are drawn together."""
    figures = []
    for adapter in dict.fromkeys(line["adapter"] for line in lines):
        items = [
            Item(float(line["correct"]), canonical(line["question"]), line["category"])
            for line in lines
            if line["adapter"] == adapter
        ]
        figures += make_figures(items, adapter, OPSWAP, "exact_match", "share")
    return figures
