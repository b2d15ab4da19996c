"""Tables, plots and the HTML page of a comparison."""

from emarecipes.reporting.page import write_report

__all__ = ["write_report"]
