"""Evaluation: suites of questions, a class each, their figures, and how sure these are."""

from emarecipes.evaluation.figures import Figure, Item, make_figures
from emarecipes.evaluation.suite import Scored, Suite
from emarecipes.evaluation.suite_context import SuiteContext

__all__ = ["Figure", "Item", "Scored", "Suite", "SuiteContext", "make_figures"]
