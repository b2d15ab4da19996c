"""The settings of an extraction, and everything that can be found wrong before a weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from emarecipes.checked import Checked
from emarecipes.config import Origin, find_input
from emarecipes.errors import UserError
from emarecipes.judges.calls import check_judge
from emarecipes.models.sampling.draw import derived_seed
from emarecipes.models.sampling.prompts import check_prompts
from emarecipes.persona.kept import CALLS_AN_ANSWER
from emarecipes.persona.prompts import PersonaPrompts, load_prompts
from emarecipes.persona.written import VECTORS, check_result_folder
from emarecipes.settings import (
    Entry,
    ModelSettings,
    Positive,
    Seed,
    Temperature,
    parse_settings,
)

# A mean over fewer answers of a side says little about the trait.
MIN_KEPT = 4
RESULT_FILES = (
    "config.yaml",
    "answers.jsonl",
    "persona.json",
    "persona.png",
    VECTORS,
)


class PersonaSettings(ModelSettings):
    """What `recipes/ema_persona.py` reads at the top level of its config."""

    seed: Seed | None = None
    """Fixes answers, held-out questions and the random vector."""
    prompts: Annotated[str, Field(min_length=1)]
    """A trait, pairs of contrasting system prompts, questions, as in
    `data/persona/ill_will.yaml`."""
    samples_per_question: Positive = 1
    """Published 10. Answers are pairs x 2 x questions x this."""
    max_new_tokens: Positive = 64
    """Of an answer."""
    temperature: Temperature = 1.0
    """0: the most likely token; else at least 0.001."""
    top_k: Positive | None = None
    """Null: from all tokens."""
    batch_size: Positive = 16
    """Answers at a time."""
    keep: Literal["likelihood", "all", "judge"] = "likelihood"
    """Which answers make the vector."""
    judge: Annotated[str, Field(min_length=1)] | None = None
    """With `keep: judge` alone: an Inspect provider string."""
    max_calls: Positive | None = None
    """With `keep: judge` alone: refuse to start a run that would take more calls."""
    held_out_questions: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of questions kept out of the vectors, to measure them on."""
    num_directions: Positive = 4
    """Of the tensor `subspace`, at most."""
    save_answers: bool = True
    """Write `answers.jsonl`."""
    provenance: Entry | None = None
    """Written into a result's `config.yaml`; not read."""


def check_persona_settings(cfg: DictConfig, origin: Origin) -> DictConfig:
    """Check the plain values of an extraction's config, fill in defaults and draw a seed.

    Raises:
        UserError: An unknown or missing key, a value of a wrong type or out of range, no such
            prompts file.
    """
    settings = parse_settings(cfg, origin, PersonaSettings)
    if settings.keep == "judge" and settings.judge is None:
        raise UserError(
            f"{origin.at('keep')}: judge needs the key judge, an Inspect provider string such as "
            "openai/gpt-4o-mini"
        )
    for key in ("judge", "max_calls"):
        if settings.keep != "judge" and getattr(settings, key) is not None:
            raise UserError(
                f"{origin.at(key)}: has no effect with keep: {settings.keep}; leave the key out, "
                "or say keep: judge"
            )
    if settings.temperature == 0 and settings.samples_per_question > 1:
        raise UserError(
            f"{origin.at('samples_per_question')}: at temperature 0 all samples are the same"
        )
    settings.prompts = find_input(settings.prompts)
    if not Path(settings.prompts).is_file():
        raise UserError(f"{origin.at('prompts')}: no such file: {settings.prompts}")
    if settings.seed is None:
        settings.seed = int(torch.randint(2**31, ()))
    return OmegaConf.create(settings.model_dump())


class CheckedExtraction(Checked):
    """An extraction that passed every check.

    Attributes:
        prompts: The trait's pairs of system prompts, and the questions.
        held_out: Numbers of the questions that vectors are measured on.
    """

    settings = staticmethod(check_persona_settings)
    prompts: PersonaPrompts
    held_out: frozenset[int]

    def check_output(self) -> None:
        """It holds no run of training, and nothing of an extraction that is not to be replaced."""
        super().check_output()
        check_result_folder(self.cfg, self.origin, RESULT_FILES)

    def check_inputs(self) -> None:
        """The prompts, and the judge."""
        self.prompts = load_prompts(Path(self.cfg.prompts))
        self.held_out = _held_out(self.cfg, self.origin, self.prompts)
        if self.cfg.keep == "judge":
            _check_judge(self.cfg, self.origin, self.prompts)

    def check_rows(self) -> None:
        """Every question behind every system prompt, and alone."""
        prompts, model = self.prompts, self.source.meta_model
        systems = [text for pair in prompts.pairs for text in (pair.positive, pair.negative)]
        asked = [(system, text) for system in (None, *systems) for text in prompts.questions]
        check_prompts(asked, self.tokenizer, model, self.cfg.max_new_tokens, self.origin)


def _held_out(cfg: DictConfig, origin: Origin, prompts: PersonaPrompts) -> frozenset[int]:
    total = len(prompts.questions)
    count = round(cfg.held_out_questions * total)
    if not 0 < count < total:
        raise UserError(
            f"{origin.at('held_out_questions')}: {cfg.held_out_questions:g} of {total} questions "
            f"leaves none to {'measure the separation on' if count == 0 else 'make the vector of'}"
        )
    answers = len(prompts.pairs) * (total - count) * cfg.samples_per_question
    if answers < MIN_KEPT:
        raise UserError(
            f"{origin.at('samples_per_question')}: {answers} answers a side are left to make the "
            f"vector of, at least {MIN_KEPT} are needed; add questions or samples_per_question"
        )
    generator = torch.Generator().manual_seed(derived_seed(cfg.seed, "held out"))
    return frozenset(torch.randperm(total, generator=generator)[:count].tolist())


def _check_judge(cfg: DictConfig, origin: Origin, prompts: PersonaPrompts) -> None:
    for key in ("judge_prompt", "coherence_prompt"):
        if getattr(prompts, key) is None:
            raise UserError(f"{cfg.prompts}: keep: judge needs the key {key} in the prompts file")
    answers = 2 * len(prompts.pairs) * len(prompts.questions) * cfg.samples_per_question
    calls = CALLS_AN_ANSWER * answers
    if cfg.max_calls is not None and calls > cfg.max_calls:
        raise UserError(
            f"{origin.at('max_calls')}: {answers} answers take up to {calls} calls of the judge, 2 "
            f"each, which is more than {cfg.max_calls}"
        )
    try:
        check_judge(cfg.judge)
    except UserError as error:
        raise UserError(f"{origin.at('judge')}: {error}") from None
