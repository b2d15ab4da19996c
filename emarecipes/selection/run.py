"""The command behind `recipes/ema_select.py`: check, score, rank, write."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from torchtune.utils import get_device

from emarecipes.command import run_alone
from emarecipes.errors import UserError
from emarecipes.models.adapters.read import read_adapter, set_adapter
from emarecipes.models.batch import longest_first
from emarecipes.models.likelihoods import GivenAnswers
from emarecipes.models.loss_head import LossHead
from emarecipes.models.source import load_model
from emarecipes.output_dir import held
from emarecipes.progress import Progress
from emarecipes.selection.checked import CheckedSelection
from emarecipes.selection.results import write_results
from emarecipes.selection.score_file import Score
from emarecipes.stop import stoppable

# Batches that share one turn of every adapter: exchanging adapters costs a copy of their weights.
_BATCHES_A_TURN = 4


def run_select(argv: Sequence[str]) -> int:
    """Score candidates and select the best as `--config FILE [key=value | ~key]...` says.

    Returns:
        The exit code: 0, or 1 after a `UserError`, which is printed as one line.
    """
    return run_alone("ema_select", _select, argv)


def _select(argv: Sequence[str]) -> None:
    run = CheckedSelection(argv)
    with held(Path(run.cfg.output_dir), run.origin.at("output_dir")):
        run.file.open()
        score_candidates(run)
        write_results(run)


def score_candidates(run: CheckedSelection) -> None:
    """Append the score of every candidate that has none yet to the run's score file.

    Batches are the same however often the run was stopped, so that it does not change a score.

    Raises:
        UserError: A likelihood is not finite.
    """
    every = longest_first([one.sample["tokens"] for one in run.scored], run.cfg.batch_size)
    todo = [rows for rows in every if not _is_scored(run, rows)]
    if not todo:
        return
    device = get_device(run.cfg.device or "cpu")
    answers = GivenAnswers(run.rows, run.tokenizer.pad_id, run.cfg.pad_to_multiple_of, device)
    model = load_model(run.cfg)
    head = LossHead(model)
    adapters = {name: read_adapter(model, Path(name), run.source) for name in run.cfg.adapters}
    run.file.open()
    current = ""
    a_turn = _BATCHES_A_TURN if len(adapters) > 1 else 1
    done = len(run.file.scores)
    with (
        stoppable("scores so far are kept; the same command goes on", in_batches=True) as stop,
        Progress(total=len(run.scored), initial=done, desc="Scoring", unit="row") as bar,
    ):
        for start in range(0, len(todo), a_turn):
            batches = todo[start : start + a_turn]
            nll = {"": answers.mean_nll(head, batches, reference=True)}
            # The adapter that is there goes first.
            for name in sorted(adapters, key=lambda name: name != current):
                if name != current:
                    set_adapter(model, adapters[name])
                    current = name
                nll[name] = answers.mean_nll(head, batches, reference=False)
            scores = [_score(run, row, nll) for row in nll[""]]
            new = [score for score in scores if score.index not in run.file.scores]
            run.file.append(new)
            bar.update(len(new))
            stop.heed()


def _is_scored(run: CheckedSelection, rows: list[int]) -> bool:
    return all(run.scored[row].index in run.file.scores for row in rows)


def _score(run: CheckedSelection, row: int, nll: dict[str, dict[int, float]]) -> Score:
    candidate = run.scored[row]
    values = {name: of_rows[row] for name, of_rows in nll.items()}
    for name, value in values.items():
        if not math.isfinite(value):
            model = name or "the base model"
            raise UserError(
                f"{run.cfg.candidates}: row {candidate.index}: NLL {value} with {model}"
            )
    return Score(
        index=candidate.index,
        tokens=candidate.tokens,
        nll_aligned=values[""],
        nll_adapters={name: values[name] for name in run.cfg.adapters},
    )
