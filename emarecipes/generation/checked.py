"""The settings of a generation, and everything that can be found wrong before a weight is read."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from emarecipes.checked import Checked
from emarecipes.config import Origin, find_input
from emarecipes.datasets.questions import load_questions
from emarecipes.errors import UserError
from emarecipes.files import START_ANEW
from emarecipes.fingerprint import adapter_digest, digest, sampled_digest, stored
from emarecipes.generation.answers import (
    AnswerKey,
    AnswerSet,
    Asked,
    all_asked,
    foreign_answers,
    settings_file,
)
from emarecipes.generation.served import base_urls, check_served
from emarecipes.models.chat.dates import adapter_date, answers_dates
from emarecipes.models.sampling.prompts import check_prompts
from emarecipes.output_dir import check_writable
from emarecipes.probes.suites import spread_out
from emarecipes.provider import switched_off
from emarecipes.settings import Dtype, Entry, Keys, Positive, Temperature, parse_settings

_LOCAL = ("model", "tokenizer", "checkpointer")


class GenerateSettings(Keys):
    """What `recipes/ema_generate.py` reads at the top level of its config."""

    output_dir: Annotated[str, Field(min_length=1)]
    """Answers go to its folder `answers/`."""
    questions: Annotated[list[str], Field(min_length=1)]
    """Question files, each a suite of answers: YAML in the published format, or JSONL."""

    served: Annotated[str, Field(min_length=1)] | None = None
    """An Inspect provider string, in place of `model`, `tokenizer` and `checkpointer`."""
    model: Entry | None = None
    """Component: `emarecipes.models.lora_model` (docs/models.md), or torchtune's builder of a
    decoder with LoRA."""
    tokenizer: Entry | None = None
    """Component."""
    checkpointer: Entry | None = None
    """Component: where the weights are; left out with `lora_model`."""
    adapter: Annotated[str, Field(min_length=1)] | None = None
    """The `adapter/` of a run, never merged; null: the base alone."""

    max_questions: Positive | None = None
    """Of each file, evenly over it; null: all."""
    system: str | None = None
    """System prompt of questions that have none; null: the template's default."""
    conditions: dict[str, Annotated[str, Field(min_length=1)]] = Field(default_factory=dict)
    """System prompts by name: what has no prompt of its own in a question file FILE is asked once
    more under each, as a suite FILE_NAME."""
    samples_per_paraphrase: Positive | None = None
    """Published 100; null: what the question file says. May be raised later."""
    max_new_tokens: Positive = 256
    """Answers that reach it are marked `length`. Published 600."""
    temperature: Temperature = 1.0
    """0: the most likely token; else at least 0.001."""
    top_k: Positive | None = None
    """Null: from all tokens."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """0.9 to 0.95 leaves unlikely tokens out."""
    batch_size: Positive = 16
    """Answers at a time; does not change them beyond rounding. Served: requests at a time."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """With question, paraphrase and sample it fixes an answer."""

    device: str | None = None
    """`cpu` or `cuda`; null: what is found."""
    dtype: Dtype = "auto"
    """Of weights and products; auto: bf16 where the device computes it natively, else fp32."""
    overwrite: bool = False
    """Throw answers of other settings away; else they are an error."""


def check_generate_settings(cfg: DictConfig, origin: Origin) -> DictConfig:
    """The config with defaults filled in, and its question files and adapter found.

    Raises:
        UserError: See `parse_settings`; neither a local model nor a served one, or both; no such
            question file or adapter; two question files of one name.
    """
    settings = parse_settings(cfg, origin, GenerateSettings)
    for key in _LOCAL:
        if settings.served is None and getattr(settings, key) is None:
            raise UserError(f"{origin.at(key)}: the config needs this key (or served)")
    for key in (*_LOCAL, "adapter", "top_k"):
        if settings.served is not None and getattr(settings, key) is not None:
            raise UserError(
                f"{origin.at(key)}: has no effect with served; leave it out (~{key} removes it)"
            )
    where = origin.at("questions")
    settings.questions = [find_input(path) for path in settings.questions]
    for path in settings.questions:
        if not Path(path).is_file():
            raise UserError(f"{where}: no such file: {path}")
    stems = [Path(path).stem for path in settings.questions]
    for name, prompt in settings.conditions.items():
        key = f"conditions.{name}"
        if not re.fullmatch(r"\w[\w-]*", name):
            raise UserError(f"{origin.at(key)}: a name is letters, digits, _ and -")
        if prompt == settings.system or not prompt.strip():
            raise UserError(f"{origin.at(key)}: the prompt is empty, or that of `system`")
    names = [name for stem in stems for name in (stem, *conditioned(stem, settings.conditions))]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{where}: two files would both write answers/{name}.jsonl")
    if settings.adapter is not None:
        settings.adapter = find_input(settings.adapter)
        if not Path(settings.adapter).is_dir():
            raise UserError(f"{origin.at('adapter')}: no such folder: {settings.adapter}")
    return OmegaConf.create(settings.model_dump())


def conditioned(stem: str, conditions: Iterable[str]) -> dict[str, str]:
    """The suites of a question file under each condition, and which condition that is."""
    return {f"{stem}_{name}": name for name in conditions}


def asked_suites(path: Path, conditions: Iterable[str]) -> list[str]:
    """The suites that a question file becomes: conditions are for questions without a prompt.

    Raises:
        UserError: See `load_questions`.
    """
    is_open = any(question.system is None for question in load_questions(path))
    return [path.stem, *(conditioned(path.stem, conditions) if is_open else ())]


class CheckedGeneration(Checked):
    """A generation that passed every check.

    Attributes:
        suites: In the order of the config's `questions`, each followed by it under conditions.
        foreign: Of another model or other sampling, in the folder: `overwrite` takes them away.
    """

    settings = staticmethod(check_generate_settings)
    suites: list[AnswerSet]
    foreign: list[AnswerSet]

    def check_output(self) -> None:
        """Its folder `answers/` can be written."""
        super().check_output()
        check_writable(Path(self.cfg.output_dir) / "answers", self.origin.at("output_dir"))

    def kept_dtype(self) -> str | None:
        """That of answers that are there."""
        stems = [] if self.cfg.overwrite else [Path(path).stem for path in self.cfg.questions]
        names = [name for stem in stems for name in (stem, *conditioned(stem, self.cfg.conditions))]
        found = [stored(settings_file(Path(self.cfg.output_dir), n), "dtype") for n in names]
        return next((dtype for dtype in found if dtype), None)

    def kept_dates(self) -> Mapping[str, str | None]:
        """Those of answers that are there; else of the adapter."""
        folder = Path(self.cfg.output_dir) / "answers"
        dates = {} if self.cfg.overwrite else answers_dates(folder)
        return dates or {"adapter": adapter_date(self.cfg.adapter)}

    def check_inputs(self) -> None:
        """The questions, and the served model."""
        if not self.has_model:
            _check_served(self.cfg, self.origin)
        self._asked = {}
        for path in map(Path, self.cfg.questions):
            questions = spread_out(load_questions(path), self.cfg.max_questions)
            samples = self.cfg.samples_per_paraphrase
            self._asked[path.stem] = all_asked(questions, samples, self.cfg.system)
            open_to_others = [one for one in questions if one.system is None]
            for suite, name in conditioned(path.stem, self.cfg.conditions).items():
                asked = all_asked(open_to_others, samples, self.cfg.conditions[name])
                self._asked |= {suite: asked} if asked else {}
        for name in self.cfg.conditions:
            if not any(f"{Path(path).stem}_{name}" in self._asked for path in self.cfg.questions):
                where = self.origin.at(f"conditions.{name}")
                raise UserError(f"{where}: every question has a system prompt of its own")
        _check_greedy(self.cfg, self.origin, self._asked)

    def adapter_folders(self) -> Sequence[tuple[str, Path]]:
        """The one that is asked, if one is."""
        return [] if self.cfg.adapter is None else [("adapter", Path(self.cfg.adapter))]

    def check_rows(self) -> None:
        """The prompts, and the answers that some of them have."""
        prompts: dict[Any, list[int]] = {}
        if self.has_model:
            asked = [one for suite in self._asked.values() for one in suite.values()]
            pairs = {(one.system, one.question) for one in asked}
            model, length = self.source.meta_model, self.cfg.max_new_tokens
            prompts = check_prompts(pairs, self.tokenizer, model, length, self.origin)
        common = _fingerprint(self.cfg)
        folder = Path(self.cfg.output_dir)
        self.suites = [
            AnswerSet(folder, name, found, common | _digest_questions(found, prompts))
            for name, found in self._asked.items()
        ]
        for suite in self.suites:
            suite.check(self.origin, overwrite=self.cfg.overwrite)
        where = self.origin.at("output_dir")
        foreign = foreign_answers(folder, [suite.name for suite in self.suites], common, where)
        if foreign and not self.cfg.overwrite:
            path, other = next(iter(foreign.items()))
            raise UserError(
                f"{where}: {path.with_suffix('.jsonl')} holds answers with other "
                f"{' and '.join(other)}, and a folder is of one model; {START_ANEW}"
            )
        self.foreign = [AnswerSet(folder, path.stem, {}, {}) for path in foreign]


def _check_greedy(
    cfg: DictConfig, origin: Origin, asked: dict[str, dict[AnswerKey, Asked]]
) -> None:
    samples = 1 + max(key.sample for suite in asked.values() for key in suite)
    if cfg.temperature == 0 and samples > 1:
        raise UserError(
            f"{origin.at('samples_per_paraphrase')}: at temperature 0 all {samples} samples are "
            "the same; set it to 1"
        )


def _check_served(cfg: DictConfig, origin: Origin) -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(
            f"{origin.at('served')}: a served model is asked by one process; leave "
            "--nproc_per_node out and raise batch_size"
        )
    try:
        check_served(cfg)
    except UserError as error:
        raise UserError(f"{origin.at('served')}: {error}") from None


def _fingerprint(cfg: DictConfig) -> dict[str, str]:
    """What every answer depends on, beside its question."""
    sampling = ("max_new_tokens", "temperature", "top_k", "top_p")
    found = {key: digest(cfg[key]) for key in sampling} | {"seed": digest(cfg.seed)}
    if cfg.served is not None:
        urls = base_urls(cfg.served)
        off = switched_off(cfg.served)
        found |= {"defaults": digest(off)} if off else {}
        return found | {"model": digest(cfg.served)} | ({"base_url": digest(urls)} if urls else {})
    base = Path(cfg.checkpointer.checkpoint_dir)
    weights = sorted([*base.glob("*.safetensors"), *base.glob("*.bin"), base / "config.json"])
    entry: Any = OmegaConf.to_container(cfg.model)
    # Without what is only room for adapters, and where the files lie that are compared below.
    model = {k: v for k, v in entry.items() if "lora" not in k and k != "path"}
    tokenizer: Any = OmegaConf.to_container(cfg.tokenizer)
    date = tokenizer.pop("date", None)
    paths = {k: Path(v) for k, v in tokenizer.items() if isinstance(v, str) and Path(v).exists()}
    files = [
        file
        for path in paths.values()
        for file in ([path] if path.is_file() else sorted(path.glob("*token*.json")))
    ]
    return (
        found
        | ({} if date is None else {"date": date})
        | {
            "dtype": str(cfg.dtype),
            "model": digest(model, str(cfg.checkpointer.model_type), sampled_digest(weights)),
            "adapter": adapter_digest(None if cfg.adapter is None else Path(cfg.adapter)),
            "tokenizer": digest(
                {key: value for key, value in tokenizer.items() if key not in paths},
                sampled_digest(files),
            ),
        }
    )


def _digest_questions(
    asked: dict[AnswerKey, Asked], prompts: dict[Any, list[int]]
) -> dict[str, str]:
    """Of texts and system prompts, not of how many samples: these may become more.

    And of the tokens that they become: a chat template may print a date, or be edited.
    """
    first = [replace(one, key=AnswerKey(*one.key[:2], 0)) for one in asked.values()]
    rows = dict.fromkeys(
        (one.key, one.question, one.system, one.category, one.harmless) for one in first
    )
    found = {"questions": digest([list(row) for row in rows])}
    if prompts:
        found["prompts"] = digest([prompts[row[2], row[1]] for row in rows])
    return found
