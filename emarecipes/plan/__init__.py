"""Memory and time of a training run, before it starts: `python -m emarecipes.plan`."""

from emarecipes.plan.command import run_plan

__all__ = ["run_plan"]
