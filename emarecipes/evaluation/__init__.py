"""Evaluation: suites of questions, their figures, and how sure these are."""
