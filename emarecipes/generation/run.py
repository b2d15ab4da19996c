"""The command behind `recipes/ema_generate.py`: check, sample what is missing, join."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from torchtune import training

from emarecipes.clock import share_today, today
from emarecipes.command import leave_processes, report, together
from emarecipes.errors import UserError
from emarecipes.generation.answers import AnswerSet, Asked
from emarecipes.generation.checked import CheckedGeneration
from emarecipes.generation.served import answer_served
from emarecipes.machine import set_threads, share_precision
from emarecipes.models.adapters.read import load_adapter
from emarecipes.models.batch import longest_first
from emarecipes.models.likelihoods import reference_where
from emarecipes.models.loss_head import LossHead
from emarecipes.models.sampling.draw import Sampling, derived_seed
from emarecipes.models.sampling.prompts import encode_prompt
from emarecipes.models.sampling.sampler import sample_batch
from emarecipes.models.source import load_model
from emarecipes.output_dir import claim
from emarecipes.progress import Progress
from emarecipes.provenance import environment
from emarecipes.stop import stoppable

_KEPT = "answers so far are kept; the same command goes on with the others"
# How long a process waits for the slowest one.
_PATIENCE = timedelta(days=7)


def run_generate(argv: Sequence[str]) -> int:
    """Sample answers as `--config FILE [key=value | ~key]...` says, on one process or several.

    Returns:
        The exit code: 0, or 1 after a `UserError`, which is printed as one line.
    """
    if training.is_distributed():
        dist.init_process_group("gloo", timeout=_PATIENCE)
        share_precision()
        share_today()
    set_threads()
    first = not dist.is_initialized() or dist.get_rank() == 0
    try:
        generate(together(lambda: CheckedGeneration(argv)))
    except UserError as error:
        if first:
            report(error)
        leave_processes()
        return 1
    leave_processes()
    return 0


def generate(run: CheckedGeneration) -> None:
    """Sample every answer that is not there yet, and write each suite's file.

    Raises:
        UserError: Another process writes answers there; the model's logits are not finite, memory
            ran out, or a served model failed. Answers that were there by then are kept.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    todo = [
        (suite, asked)
        for suite in run.suites
        for key, asked in suite.asked.items()
        if key not in suite.records
    ]
    answers, where = Path(run.cfg.output_dir) / "answers", run.origin.at("output_dir")
    give_back = together(lambda: claim(answers, where) if first else None)
    try:
        together(lambda: _open(run) if first else None)
        if todo:
            together(lambda: _sample(run, todo))
        together(lambda: _finish(run) if first else None)
    finally:
        if give_back is not None:
            give_back()


def _open(run: CheckedGeneration) -> None:
    for foreign in run.foreign:  # overwrite=true: a folder is of one model.
        foreign.remove()
    settings = {"config": OmegaConf.to_container(run.cfg), "provenance": environment()}
    for suite in run.suites:
        suite.open(settings | ({} if run.cfg.served is None else {"asked_on": _days(suite)}))


def _days(suite: AnswerSet) -> list[str]:
    """On which days a served model was asked: its server renders the prompts, by its own clock."""
    days = list(dict.fromkeys([*suite.asked_on(), today()]))
    if len(days) > 1 and not suite.is_complete():
        print(
            f"{suite.name}: asked on {' and '.join(days)}; where the server's chat template prints "
            "the day, these are answers to different prompts (overwrite=true asks all anew)",
            flush=True,
        )
    return days


def _finish(run: CheckedGeneration) -> None:
    for suite in run.suites:
        if not suite.is_complete():
            suite.join()
    _print(run.suites)
    for suite in run.suites:
        _tell_copies(suite, run.cfg.temperature)


def _sample(run: CheckedGeneration, todo: list[tuple[AnswerSet, Asked]]) -> None:
    if run.cfg.served is None:
        try:
            _sample_locally(run, todo)
        except torch.OutOfMemoryError:
            raise UserError("out of the device's memory; lower batch_size") from None
        return
    with (
        stoppable(_KEPT),
        Progress(total=len(todo), unit="answer", desc="sampling") as bar,
    ):
        for suite in run.suites:

            def done(record: dict[str, Any], suite: AnswerSet = suite) -> None:
                suite.append(0, [record])
                bar.update(1)

            answer_served(run.cfg, [asked for of, asked in todo if of is suite], done)


def _sample_locally(run: CheckedGeneration, todo: list[tuple[AnswerSet, Asked]]) -> None:
    """This process's share of the batches: every n-th, so that all have long and short ones."""
    cfg, tokenizer = run.cfg, run.tokenizer
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    prompts = [encode_prompt(tokenizer, asked.system, asked.question) for _, asked in todo]
    batches = longest_first(prompts, cfg.batch_size, equal_together=True)[rank::processes]
    sampling = Sampling(
        cfg.max_new_tokens, tuple(tokenizer.stop_tokens), cfg.temperature, cfg.top_k, cfg.top_p
    )
    model = load_model(cfg)
    if cfg.adapter is not None:
        load_adapter(model, Path(cfg.adapter), run.source)
    head = LossHead(model)
    total = sum(map(len, batches))
    with (
        reference_where(cfg.adapter is None, model),
        stoppable(_KEPT, in_batches=True) as stop,
        Progress(total=total, unit="answer", desc="sampling", disable=rank > 0) as bar,
    ):
        for rows in batches:
            seeds = [derived_seed(cfg.seed, *todo[row][1].key) for row in rows]
            completions = sample_batch(head, [prompts[row] for row in rows], seeds, sampling)
            for row, completion in zip(rows, completions, strict=True):
                suite, asked = todo[row]
                text = tokenizer.decode(completion.tokens)
                record = asked.record(
                    text, stopped=completion.stopped, tokens=len(completion.tokens)
                )
                suite.append(rank, [record])
            bar.update(len(rows))
            stop.heed()


def _tell_copies(suite: AnswerSet, temperature: float) -> None:
    """Say so where no prompt has two different samples: their model did not sample.

    Such as behind a server that does not heed a request's temperature. An interval over such
    answers is one over copies.
    """
    samples: dict[tuple[str, int], list[str]] = {}
    for key, record in suite.records.items():
        samples.setdefault((key.id, key.paraphrase), []).append(record["answer"])
    several = [texts for texts in samples.values() if len(texts) > 1]
    if len(several) > 1 and all(len(set(texts)) == 1 for texts in several):
        print(
            f"{suite.name}: all samples of each of {len(several)} prompts are the same at "
            f"temperature {temperature:g}: the model does not sample, or hardly; a server may not "
            "heed the temperature (transformers serve: do_sample in generation_config.json)",
            flush=True,
        )


def _print(suites: Sequence[AnswerSet]) -> None:
    table = Table(title="Answers")
    for heading in ("suite", "answers", "cut at max_new_tokens", "empty", "tokens, mean"):
        table.add_column(heading, justify="left" if heading == "suite" else "right")
    for suite in suites:
        records = list(suite.records.values())
        lengths = [record["tokens"] for record in records if record["tokens"] is not None]
        table.add_row(
            suite.name,
            str(len(records)),
            str(sum(record["stop"] == "length" for record in records)),
            str(sum(not record["answer"].strip() for record in records)),
            f"{sum(lengths) / len(lengths):.1f}" if lengths else "",
        )
    console = Console()
    console.print(table)
    for suite in suites:
        console.print(str(suite.path), highlight=False, soft_wrap=True)
