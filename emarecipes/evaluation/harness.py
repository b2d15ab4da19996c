"""Tasks of lm-evaluation-harness, if `lm_eval` is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from emarecipes.config import Origin, suggestion
from emarecipes.errors import UserError
from emarecipes.evaluation.figures import Figure
from emarecipes.evaluation.suite import KeyedSuite, Scored
from emarecipes.evaluation.suite_context import SuiteContext
from emarecipes.models.chat.tokenizer import printed_day
from emarecipes.models.loss_head import LossHead
from emarecipes.settings import Keys, Positive, parse_settings

if TYPE_CHECKING:
    from emarecipes.evaluation.suite_context import Model

HARNESS = "harness_"

# The normal distribution's 97.5 % quantile: the harness gives standard errors.
_Z = 1.959964


class HarnessSettings(Keys):
    """The entry `harness`: tasks of lm-evaluation-harness, as it defines them."""

    tasks: Annotated[list[str], Field(min_length=1)]
    """Their names; any of `lm-eval ls tasks`."""
    limit: Positive | None = None
    """Questions a task, the first ones; null: all."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Answered examples before a question; null: as the task says. A task that says 0 keeps it."""
    apply_chat_template: bool = False
    """Put questions as the base's chat template has them, with `tokenizer.template_arguments`; a
    few-shot example as a turn and its answer."""
    date: str | None = None
    """The day for a chat template that reads the clock; null: `tokenizer.date`."""
    include_path: str | None = None
    """A folder with definitions of further tasks."""
    include_defaults: bool = True
    """Whether lm_eval's own tasks are known too: it reads some 14,000 files."""
    max_seq_len: Positive = 2048
    """Tokens of a text, at most the model's own."""
    batch_size: Positive = 8
    """Texts at a time."""


class Harness(KeyedSuite):
    """`harness_<task>`: tasks as lm-evaluation-harness defines them."""

    kind = "harness"

    @classmethod
    def named(cls, cfg: DictConfig, origin: Origin) -> Iterator[KeyedSuite]:
        """Where the config has the entry, which gets its defaults."""
        if cfg.harness is not None:
            found = parse_settings(cfg.harness, origin, HarnessSettings, within="harness")
            cfg.harness = found.model_dump()
            yield cls()

    def check(self, context: SuiteContext) -> None:
        """See whether its tasks and template are there, and which day the template prints."""
        self._cfg = context.cfg
        check_harness(context.cfg.harness, context.origin)
        check_harness_template(context.cfg, context.origin)
        settle_harness_date(context.cfg, context.origin)

    def score(self, models: Mapping[str, Model]) -> Iterator[Scored]:
        """By model and task."""
        for name, model in models.items():
            with model.in_place() as head:
                found = run_harness(head, self._cfg, self._cfg.harness)
            figures, described = list(harness_figures(name, found)), dict(harness_suites(found))
            for suite in dict.fromkeys(
                [*described, *(f"{HARNESS}{task}" for task in found["samples"])]
            ):
                samples = found["samples"].get(suite.removeprefix(HARNESS), [])
                yield Scored(
                    [figure for figure in figures if figure.suite == suite],
                    list(harness_lines(name, samples)),
                    described.get(suite, {}),
                    suite.removeprefix(HARNESS),
                )


def check_harness(cfg: DictConfig, origin: Origin) -> None:
    """See whether the tasks can be run, without running them.

    Args:
        cfg: The checked entry `harness`.
        origin: Where it was written.

    Raises:
        UserError: `lm_eval` is not installed, or it has no such task.
    """
    for package in ("lm_eval", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"{origin.at('harness')}: needs {package}, which is not installed: pip install "
                f"{package.replace('_', '-')}"
            )
    known = _task_manager(cfg.include_path, cfg.include_defaults).all_tasks
    for task in cfg.tasks:
        if task not in known:
            raise UserError(
                f"{origin.at('harness.tasks')}: lm_eval has no task {task}{suggestion(task, known)}"
            )


def check_harness_template(cfg: DictConfig, origin: Origin) -> None:
    """See whether the base has the chat template that the entry `harness` asks for.

    Raises:
        UserError: Its folder has none, or no tokenizer that transformers reads.
    """
    if cfg.harness.apply_chat_template and _template(cfg, origin) is None:
        raise UserError(
            f"{origin.at('harness.apply_chat_template')}: {cfg.checkpointer.checkpoint_dir} has no "
            "chat template; leave it out"
        )


def settle_harness_date(cfg: DictConfig, origin: Origin) -> None:
    """Put the tokenizer's date into the entry `harness` where its chat template reads the clock.

    Raises:
        UserError: The entry's own is no day, has no effect, or is needed; the base's template does
            not read `tokenizer.template_arguments`.
    """
    entry, base = cfg.harness, str(cfg.checkpointer.checkpoint_dir)
    if not entry.apply_chat_template:
        if entry.date is not None:
            raise UserError(f"{origin.at('harness.date')}: needs apply_chat_template: true")
        return
    template = _template(cfg, origin)
    try:
        # One of several named templates is for the folder itself to tell.
        given = template if isinstance(template, str) else None
        printed = printed_day(base, given, entry.date, cfg.tokenizer.get("template_arguments"))
    except UserError as error:
        raise UserError(f"{origin.at('harness')}: {error}") from None
    if printed is not None and entry.date is None:
        entry.date = cfg.tokenizer.get("date")
        if entry.date is None:
            raise UserError(
                f"{origin.at('harness')}: {base}'s chat template prints a date, and the config's "
                "tokenizer has none; say which as harness.date (YYYY-MM-DD)"
            )


def _template(cfg: DictConfig, origin: Origin) -> Any:
    """The base's chat template as transformers reads it."""
    from transformers import AutoTokenizer

    base = str(cfg.checkpointer.checkpoint_dir)
    try:
        return AutoTokenizer.from_pretrained(base).chat_template
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{origin.at('harness')}: transformers cannot read {base}'s tokenizer: {reason}"
        ) from None


def run_harness(head: LossHead, cfg: DictConfig, entry: DictConfig) -> dict[str, Any]:
    """What the harness finds of a model.

    Args:
        head: The loss head of the model, its adapter in place or off.
        cfg: The evaluation's config.
        entry: Its entry `harness`.

    Returns:
        The result of the harness's `simple_evaluate`.

    Raises:
        UserError: A task failed, such as one whose data cannot be fetched.
    """
    from lm_eval.evaluator import simple_evaluate

    from emarecipes.evaluation._harness_model import harness_model

    tokenizer: Any = OmegaConf.to_container(cfg.tokenizer)
    model = harness_model(
        head,
        str(Path(cfg.checkpointer.checkpoint_dir)),
        device=cfg.device,
        max_seq_len=entry.max_seq_len,
        batch_size=entry.batch_size,
        date=entry.date,
        template_arguments=tokenizer.get("template_arguments"),
    )
    try:
        found = simple_evaluate(
            model,
            tasks=list(entry.tasks),
            task_manager=_task_manager(entry.include_path, entry.include_defaults),
            limit=entry.limit,
            num_fewshot=entry.num_fewshot,
            apply_chat_template=entry.apply_chat_template,
            # As lm_eval's command has it.
            fewshot_as_multiturn=entry.apply_chat_template,
        )
        return dict(found or {})
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"lm_eval failed: {reason}") from error


def harness_figures(adapter: str, found: Mapping[str, Any]) -> Iterator[Figure]:
    """Each task's metrics with the harness's own standard error as a normal 95 % interval.

    A group of tasks, such as mmlu, has its own metrics where the harness defines them, and as many
    questions as its tasks together.
    """
    for task, values in found["results"].items():
        count = _questions(found, task)
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            half = _Z * error if isinstance(error, float) else None
            yield Figure(
                adapter,
                f"{HARNESS}{task}",
                metric if kind == "none" else f"{metric} ({kind})",
                None,
                float(value),
                None if half is None else value - half,
                None if half is None else value + half,
                count,
                count,
                "the task's own",
            )


def harness_suites(found: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and description of every suite that has a figure. A group's names its `tasks`."""
    for figure in harness_figures("", found):
        task = figure.suite.removeprefix(HARNESS)
        tasks = _leaves(found, task)
        yield (
            figure.suite,
            {
                "kind": "harness",
                "files": {},
                "version": found["versions"].get(task),
                "questions": figure.questions,
            }
            | ({} if tasks == [task] else {"tasks": tasks}),
        )


def _questions(found: Mapping[str, Any], task: str) -> int:
    counts = found.get("n-samples", {})
    return sum(counts.get(name, {}).get("effective", 0) for name in _leaves(found, task))


def _leaves(found: Mapping[str, Any], name: str) -> list[str]:
    """The tasks of a group and of the groups in it; of a task, itself."""
    children = found.get("group_subtasks", {}).get(name)
    if not children:
        return [name]
    return list(dict.fromkeys(leaf for child in children for leaf in _leaves(found, child)))


def harness_lines(adapter: str, samples: list[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """A line a sample and filter of a task for `scores/harness_<task>.jsonl`."""
    for sample in samples:
        arguments = sample["arguments"]
        yield {
            "adapter": adapter,
            "id": str(sample["doc_id"]),
            "filter": sample["filter"],
            "question": str(arguments[0][0]) if arguments else "",
            "target": str(sample["target"]),
            "responses": [str(response) for response in sample["filtered_resps"]],
            **{metric: sample[metric] for metric in sample.get("metrics", ())},
        }


@lru_cache(maxsize=1)
def _task_manager(include_path: str | None, include_defaults: bool) -> Any:
    """The harness's; with its own tasks it reads some 14,000 files, so once for all adapters."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=include_defaults)
