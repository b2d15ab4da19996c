"""What verdicts follow from beside the runs: their rules, and what is asked of every run."""

from __future__ import annotations

from pathlib import Path

from emarecipes.comparison.arms import fingerprint
from emarecipes.comparison.execute import evaluation_overrides
from emarecipes.comparison.looks import SHARED
from emarecipes.comparison.opening import RULES
from emarecipes.comparison.settings import GOOD, Plan
from emarecipes.config import load_config
from emarecipes.fingerprint import digest

BOUNDS, CRITERIA = SHARED


def rules_of(plan: Plan) -> dict[str, str]:
    """A fingerprint of each, by what the page calls it.

    Of evaluation (of the report half) and sampling it is that of the resolved config and of the
    contents of the files and models that it names: a path says nothing of what is asked.
    """
    settings = plan.settings
    found = {
        "the rules of verdicts": digest(RULES),
        BOUNDS: digest(settings.bounds.model_dump()),
        CRITERIA: digest(settings.criteria.model_dump()),
    }
    if settings.looks is not None:
        found["looks.first"] = digest(settings.looks.first)
    for name, task in plan.tasks.items():
        if name == GOOD:  # As narrow's.
            continue
        asked = _content(task.evaluate.config, evaluation_overrides(task, "report"))
        found[f"how the {name} task is evaluated"] = asked
        if task.generate is not None:
            sampled = [*task.generate.overrides, "adapter=null"]
            found[f"how the {name} task's answers are sampled"] = _content(
                task.generate.config, sampled
            )
    return found


def _content(config: str, overrides: list[str]) -> str:
    cfg, _ = load_config(["--config", config, *overrides])
    cfg.output_dir = "unused"  # What lies below it is left out; the config's own may hold files.
    return fingerprint(cfg, Path(cfg.output_dir))
