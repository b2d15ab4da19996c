"""What a model makes of texts: likelihoods of answers, and suites of questions, a class each."""

from emarecipes.evaluation.figures import Figure, Item, make_figures
from emarecipes.evaluation.nll import row_nll
from emarecipes.evaluation.suite import Scored, Suite
from emarecipes.evaluation.suite_context import SuiteContext

__all__ = ["Figure", "Item", "Scored", "Suite", "SuiteContext", "make_figures", "row_nll"]
