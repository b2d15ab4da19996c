"""Everything that can be found wrong with an evaluation before a weight is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from emarecipes.checked import Checked
from emarecipes.config import Origin, find_input
from emarecipes.errors import UserError
from emarecipes.evaluation.answers import Answer, read_answers
from emarecipes.evaluation.figures import EVAL_CONFIG, REFERENCE, SCORES, SUMMARY
from emarecipes.evaluation.settings import check_eval_settings, named_suites
from emarecipes.evaluation.suite import Suite
from emarecipes.evaluation.suite_context import SuiteContext
from emarecipes.fingerprint import adapter_digest
from emarecipes.models.adapters.trained_with import have_same_weights
from emarecipes.models.chat.dates import adapter_date, check_answers_dates
from emarecipes.output_dir import is_written


class CheckedEvaluation(Checked):
    """An evaluation that passed every check.

    Attributes:
        adapters: Their folders, by the names that figures carry.
        suites: In the order in which they are scored.
        answers: Names of `answers`, which may be others than those of adapters.
    """

    settings = staticmethod(check_eval_settings)
    adapters: dict[str, Path]
    suites: list[Suite]
    answers: frozenset[str]

    def check_output(self) -> None:
        """It holds no evaluation, nor the answers."""
        super().check_output()
        _check_output(self.cfg, self.origin)

    def kept_dates(self) -> Mapping[str, str | None]:
        """Answers are scored behind the prompts that they were sampled from; else as trained."""
        self._answered = check_answers_dates(self.cfg.answers, self.origin)
        return self._answered or {key: adapter_date(path) for key, path in self.adapter_folders()}

    def check_inputs(self) -> None:
        """The sampled answers."""
        cfg, origin = self.cfg, self.origin
        self.adapters = {str(name): Path(folder) for name, folder in cfg.adapters.items()}
        _check_date(cfg, origin, self._answered)
        self._found = {str(name): _read_answers(cfg, origin, name) for name in cfg.answers}
        _mark_harmless(cfg, origin, self._found)
        self.answers = frozenset(self._found)

    def adapter_folders(self) -> Sequence[tuple[str, Path]]:
        """Those that are evaluated."""
        return [(f"adapters.{name}", Path(path)) for name, path in self.cfg.adapters.items()]

    def check_on_model(self) -> None:
        """Answers are of the adapters that bear their names."""
        check_sampled_from(None, self.cfg, self.origin, REFERENCE)
        for name, folder in self.adapters.items():
            check_sampled_from(folder, self.cfg, self.origin, name)

    def check_rows(self) -> None:
        """The suites."""
        self.suites = named_suites(self.cfg, self.origin)
        context = SuiteContext(self.cfg, self.origin, self.source, self.tokenizer, self._found)
        check_suites(self.suites, context)


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


def _check_date(cfg: DictConfig, origin: Origin, answered: Mapping[str, str | None]) -> None:
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
    if (folder / SUMMARY).exists() and not cfg.overwrite:
        raise UserError(
            f"{where}: {folder} already holds an evaluation ({SUMMARY}); choose another "
            "output_dir, or say overwrite=true to replace it"
        )
    present = [name for name in (EVAL_CONFIG, SCORES) if (folder / name).exists()]
    if present and not is_written(folder / EVAL_CONFIG) and not (folder / SUMMARY).exists():
        raise UserError(
            f"{where}: {folder} has {' and '.join(present)} of no evaluation, which would be "
            "replaced; choose another output_dir"
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


def check_sampled_from(adapter: Path | None, cfg: DictConfig, origin: Origin, name: str) -> None:
    """Answers of one name with an adapter are that adapter's, and not of one before it there.

    What they were sampled from stands beside them. Of a merged folder, a server, or answers of
    another origin it does not. Without an adapter (the reference's) they are of none.
    """
    if name not in cfg.answers:
        return
    for path in sorted(Path(cfg.answers[name]).glob("*.jsonl")):
        try:
            settings = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            stored = settings["fingerprint"].get("adapter")
        except (OSError, ValueError, KeyError, AttributeError):
            continue
        if adapter is None and _is_of_another_base(settings, cfg):
            raise UserError(
                f"{origin.at(f'answers.{name}')}: {path} was sampled from another base than the "
                f"config's, and {name} is the base; sample its own, or give these another name"
            )
        if stored in (None, adapter_digest(None), adapter_digest(adapter)):
            continue
        if adapter is None:
            raise UserError(
                f"{origin.at(f'answers.{name}')}: {path} was sampled from an adapter, and {name} "
                "is the model without one; sample the model's own, or give these another name"
            )
        raise UserError(
            f"{origin.at(f'answers.{name}')}: {path} was sampled from another adapter than "
            f"adapters.{name} is now; sample it again, or give it another name"
        )


def _is_of_another_base(settings: dict[str, Any], cfg: DictConfig) -> bool:
    """Whether answers are of a local model whose weights can be told from the config's."""
    try:
        theirs = Path(find_input(settings["config"]["checkpointer"]["checkpoint_dir"]))
    except (KeyError, TypeError):  # Of a server, or of another origin.
        return False
    ours = Path(str(cfg.checkpointer.checkpoint_dir))
    return theirs.is_dir() and not have_same_weights(theirs, ours)


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
