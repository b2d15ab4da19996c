"""How alike texts are: distinct n-grams, and each text's nearest neighbour by shared 3-grams."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")
BLOCK = 256
# Grams of a prompt template stand in most rows. Beyond this share they go into a dense matrix,
# because their posting lists would make the inverted index quadratic.
_FREQUENT = 0.02


def normalized(text: str) -> str:
    """Lower case, with runs of white space made one space."""
    return " ".join(text.lower().split())


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """The n-grams of a text's words (lower case, without punctuation), in order."""
    words = _WORD.findall(text.lower())
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct-n: number of different n-grams over number of n-grams, over all texts.

    1 where nothing repeats; it falls with the number of texts, so compare files of like size only.
    NaN without any n-gram.
    """
    grams = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def similarity_blocks(
    texts: Sequence[str], block: int = BLOCK
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Jaccard similarity of word 3-grams, |A & B| / |A | B|, of every text with every other.

    Counting goes over an inverted index. A text of fewer than three words is one gram of its own.

    Args:
        texts: N of them.
        block: rows at a time.

    Yields:
        A slice of rows and their similarities, (rows, N), self-similarity set to -1.
    """
    sets = [set(ngrams(text, 3)) or {(normalized(text),)} for text in texts]
    frequency = Counter(gram for grams in sets for gram in grams)
    # A gram of one text alone is shared with nobody: it counts in the union only.
    shared = {gram: i for i, gram in enumerate(g for g, count in frequency.items() if count > 1)}
    size = len(texts)
    lengths = np.array([len(grams) for grams in sets], dtype=np.float32)
    limit = max(50, _FREQUENT * size)
    frequent = {g: i for i, g in enumerate(g for g in shared if frequency[g] > limit)}
    dense = np.zeros((size, len(frequent)), dtype=np.float32)
    postings: dict[int, list[int]] = {}
    rare: list[list[int]] = []
    for row, grams in enumerate(sets):
        rare.append([shared[g] for g in grams if g in shared and g not in frequent])
        for gram in rare[-1]:
            postings.setdefault(gram, []).append(row)
        dense[row, [frequent[g] for g in grams if g in frequent]] = 1
    lists = {gram: np.array(rows, dtype=np.int64) for gram, rows in postings.items()}

    for start in range(0, size, block):
        rows = slice(start, min(start + block, size))
        height = rows.stop - rows.start
        hits = [lists[g] + i * size for i in range(height) for g in rare[start + i]]
        flat = np.concatenate(hits) if hits else np.zeros(0, dtype=np.int64)
        common = np.bincount(flat, minlength=height * size).reshape(height, size)
        common_RN = common.astype(np.float32) + dense[rows] @ dense.T
        jaccard_RN = common_RN / (lengths[rows, None] + lengths[None, :] - common_RN)
        jaccard_RN[np.arange(height), np.arange(rows.start, rows.stop)] = -1
        yield rows, jaccard_RN
