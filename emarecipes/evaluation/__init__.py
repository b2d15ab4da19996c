"""Evaluation: suites of questions, a class each, their figures, and how sure these are."""

from typing import TYPE_CHECKING

from emarecipes._lent import lent

if TYPE_CHECKING:
    from emarecipes.evaluation.figures import Figure, Item, make_figures
    from emarecipes.evaluation.suite import Scored, Suite
    from emarecipes.evaluation.suite_context import SuiteContext

__all__ = ["Figure", "Item", "Scored", "Suite", "SuiteContext", "make_figures"]

__getattr__ = lent(
    __name__,
    {
        "Figure": "figures",
        "Item": "figures",
        "make_figures": "figures",
        "Scored": "suite",
        "Suite": "suite",
        "SuiteContext": "suite_context",
    },
)
