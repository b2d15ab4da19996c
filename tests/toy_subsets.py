"""A few subsets that stand for all of them."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np


def covering(
    names: Sequence[str], strength: int, allowed: Callable[[set[str]], bool] = lambda _: True
) -> list[list[str]]:
    """Subsets in which any `strength` of the names are there and not there in every combination.

    A covering array, made greedily: the next subset is the one that shows most of what was not
    seen yet. What goes wrong with a few names together, or with one where others are not, shows in
    one of them, as it does among all 2^N subsets.

    Args:
        names: The N names; up to 15.
        strength: How many are taken together.
        allowed: Whether a subset may be; what none that may be shows is left out.
    """
    subsets = [
        subset
        for subset in itertools.product([False, True], repeat=len(names))
        if allowed(set(itertools.compress(names, subset)))
    ]
    there_NS = np.array(subsets).T.copy()
    # Whether a pattern, of which few names and each there or not, is shown by a subset.
    shown_PS = np.stack(
        [
            np.logical_and.reduce([there_NS[n] == p for n, p in zip(few, pattern, strict=True)])
            for few in itertools.combinations(range(len(names)), strength)
            for pattern in itertools.product([False, True], repeat=strength)
        ]
    ).astype(np.float32)
    found, missing_P = [], shown_PS.max(axis=1)
    while missing_P.any():
        best = int((missing_P @ shown_PS).argmax())
        found.append(list(itertools.compress(names, subsets[best])))
        missing_P[shown_PS[:, best] > 0] = 0
    return found
