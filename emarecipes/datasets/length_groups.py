"""Steps of rows of similar length, so that less of a batch is padding."""

from __future__ import annotations

import numpy as np

POOL_STEPS = 50
"""Rows of this many steps are sorted together: enough that a step's rows are near in length, few
enough that who meets whom is drawn anew in each epoch of a large set."""


def group_by_length(
    steps_NK: np.ndarray,
    lengths: np.ndarray,
    generator: np.random.Generator,
    is_safe_NK: np.ndarray,
) -> np.ndarray:
    """The same rows in other steps: within a pool of steps sorted by length, steps in random order.

    A step's own rows are sorted too, so that the micro-batches dealt from it hold similar rows. How
    they are dealt does not matter here: the result depends on the arguments alone.

    Args:
        steps_NK: Rows of N steps of K, in random order.
        lengths: Tokens of every row of the data set.
        generator: Draws the order of steps.
        is_safe_NK: Where safe rows are. They are sorted apart from the others, so that each step
            keeps as many of them as it drew: safe rows are of other lengths, and sorted together
            they would make steps of one source.

    Returns:
        The rows of the steps, (N, K).
    """
    grouped_NK = np.empty_like(steps_NK)
    for start in range(0, len(steps_NK), POOL_STEPS):
        pool = slice(start, start + POOL_STEPS)
        for places_PK in (is_safe_NK[pool], ~is_safe_NK[pool]):
            rows = steps_NK[pool][places_PK]
            # Stable: rows of one length stay in the order that was drawn.
            grouped_NK[pool][places_PK] = rows[np.argsort(lengths[rows], kind="stable")]
    order_NK = np.argsort(lengths[grouped_NK], axis=1, kind="stable")
    return generator.permutation(np.take_along_axis(grouped_NK, order_NK, axis=1))
