"""The base's own answers: what the share of a trait in an arm's answers is a change from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from emarecipes.comparison.arms import fingerprint
from emarecipes.comparison.settings import GenerateSettings
from emarecipes.comparison.status import Piece
from emarecipes.comparison.steps import Step
from emarecipes.config import load_config

if TYPE_CHECKING:
    from emarecipes.comparison.execute import Runner

TITLE = "answers of the base"


def sample_base(runner: Runner, generate: GenerateSettings) -> Path | None:
    """The folder with the base's answers, sampled as the arms' are; None if sampling failed."""
    folder = runner.folder / "base"
    overrides = [*generate.overrides, "adapter=null", f"output_dir={folder}"]
    cfg, _ = load_config(["--config", generate.config, *overrides])
    mark = folder / "answers.compare.json"
    step = Step(TITLE, "base_answers", mark, fingerprint(cfg, folder))
    if not (step.is_done() and (folder / "answers").is_dir()):
        runner.status.expect([Piece(TITLE, "answers", "narrow")])
        again = ["overwrite=true"] if mark.exists() else []
        command = ["recipes/ema_generate.py", "--config", generate.config, *overrides, *again]
        if not runner.run_step(step, command, place={}):
            return None
        step.write(mark)
    return folder / "answers"
