"""Everything that can be found wrong with an evaluation before a weight is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from emarecipes.components import build, check_components
from emarecipes.config import Origin, load_config
from emarecipes.defenses import ModelSource
from emarecipes.errors import UserError
from emarecipes.evaluation.answers import Answer, read_answers
from emarecipes.evaluation.figures import SCORES, SUMMARY
from emarecipes.evaluation.named_suites import named_suites
from emarecipes.evaluation.settings import check_eval_settings
from emarecipes.evaluation.suite import Suite
from emarecipes.evaluation.suite_context import SuiteContext
from emarecipes.fingerprint import adapter_digest
from emarecipes.models.adapters.read import check_adapter
from emarecipes.models.adapters.trained_with import check_origin
from emarecipes.models.chat.dates import adapter_date, check_answers_dates, settle_date
from emarecipes.models.model_checks import check_checkpoint_files, check_device, check_model


@dataclass
class CheckedEvaluation:
    """An evaluation that passed every check, with what was built on the way.

    Attributes:
        suites: In the order in which they are scored.
        answers: Names of `answers`, which may be others than those of adapters.
        origin: Where the config was written.
    """

    cfg: DictConfig
    source: ModelSource
    tokenizer: Any
    adapters: dict[str, Path]
    suites: list[Suite]
    answers: frozenset[str]
    origin: Origin


def check_evaluation(argv: Sequence[str]) -> CheckedEvaluation:
    """Read and check an evaluation: config, files, adapters, suites, answers, judges.

    Args:
        argv: `--config FILE` and overrides.

    Raises:
        UserError: The first thing that is wrong.
    """
    raw, origin = load_config(argv)
    cfg = check_eval_settings(raw, origin)
    check_components(cfg, origin)
    check_device(cfg, origin)
    _check_output(cfg, origin)
    check_checkpoint_files(cfg, origin)
    _settle_date(cfg, origin)
    answers = {str(name): _read_answers(cfg, origin, name) for name in cfg.answers}
    _mark_harmless(cfg, origin, answers)

    source = check_model(cfg, origin)
    adapters = {str(name): Path(folder) for name, folder in cfg.adapters.items()}
    for name, folder in adapters.items():
        try:
            check_adapter(folder, source)
        except UserError as error:
            raise UserError(f"{origin.at(f'adapters.{name}')}: {error}") from None
        check_origin(folder, cfg, origin.at(f"adapters.{name}"))
        _check_sampled_from(folder, cfg, origin, name)

    tokenizer = build(cfg, "tokenizer", origin)
    suites = named_suites(cfg, origin)
    check_suites(suites, SuiteContext(cfg, origin, source, tokenizer, answers))
    return CheckedEvaluation(cfg, source, tokenizer, adapters, suites, frozenset(answers), origin)


def check_suites(suites: Sequence[Suite], context: SuiteContext) -> None:
    """Let every suite read what it asks and refuse what cannot work.

    Raises:
        UserError: With the suite's place.
    """
    for suite in suites:
        try:
            if suite.needs_answers and not context.answers:
                raise ValueError("is of sampled answers; name folders of them as `answers`")
            suite.check(context)
            context.check_rows(suite.rows)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{context.origin.at(suite.key)}: {error}") from None


def _settle_date(cfg: DictConfig, origin: Origin) -> None:
    """Answers are scored behind the prompts that they were sampled from; else as trained."""
    answered = check_answers_dates(cfg.answers, origin)
    trained = {f"adapters.{name}": adapter_date(path) for name, path in cfg.adapters.items()}
    settle_date(cfg, origin, answered or trained)
    date = cfg.tokenizer.get("date")
    for key, day in answered.items():
        if date is not None and day != date:
            raise UserError(
                f"{origin.at('tokenizer.date')}: is {date}, and {key} has answers to prompts of "
                f"{day}; leave the key out, or sample them anew"
            )


def _check_output(cfg: DictConfig, origin: Origin) -> None:
    where = origin.at("output_dir")
    folder = Path(cfg.output_dir)
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"{where}: {existing} is a file, not a folder")
    if (folder / SUMMARY).exists() and not cfg.overwrite:
        raise UserError(
            f"{where}: {folder} already holds an evaluation ({SUMMARY}); choose another "
            "output_dir, or say overwrite=true to replace it"
        )
    for name, answers in cfg.answers.items():
        if Path(answers).resolve() == (folder / SCORES).resolve():
            raise UserError(
                f"{origin.at(f'answers.{name}')}: {answers} is where scores are written"
            )


def _read_answers(cfg: DictConfig, origin: Origin, name: str) -> dict[str, list[Answer]]:
    try:
        return read_answers(Path(cfg.answers[name]))
    except UserError as error:
        raise UserError(f"{origin.at(f'answers.{name}')}: {error}") from None


def _check_sampled_from(adapter: Path, cfg: DictConfig, origin: Origin, name: str) -> None:
    """Answers of one name with an adapter are that adapter's, and not of one before it there.

    What they were sampled from stands beside them. Of a merged folder, a server, or answers of
    another origin it does not.
    """
    if name not in cfg.answers:
        return
    for path in sorted(Path(cfg.answers[name]).glob("*.jsonl")):
        try:
            settings = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            stored = settings["fingerprint"].get("adapter")
        except (OSError, ValueError, KeyError, AttributeError):
            continue
        if stored not in (None, adapter_digest(None), adapter_digest(adapter)):
            raise UserError(
                f"{origin.at(f'answers.{name}')}: {path} was sampled from another adapter than "
                f"adapters.{name} is now; sample it again, or give it another name"
            )


def _mark_harmless(
    cfg: DictConfig, origin: Origin, answers: dict[str, dict[str, list[Answer]]]
) -> None:
    """Answers of the suites that the config calls harmless, where their own file does not say."""
    for suite in cfg.harmless:
        if not any(suite in files for files in answers.values()):
            known = ", ".join(dict.fromkeys(stem for files in answers.values() for stem in files))
            raise UserError(
                f"{origin.at('harmless')}: there are no answers of a suite {suite}; there are "
                f"those of {known or 'none'}"
            )
        for files in answers.values():
            if suite in files:
                files[suite] = [
                    answer.model_copy(update={"harmless": answer.harmless is not False})
                    for answer in files[suite]
                ]
