"""How alike texts are, rows of one file that are near each other, and questions that files share.

Shapes: N rows; R of them, a block; S answers a row (2 in a contrast file).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from emarecipes.datasets._check_rows import DataFile, Row, normalized
from emarecipes.datasets.json_files import Place

_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")
BLOCK = 256
# Grams of a prompt template stand in most rows. Beyond this share they go into a dense matrix,
# because their posting lists would make the inverted index quadratic.
_FREQUENT = 0.02


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


# Overlaps that are listed one by one; the rest is counted.
_LISTED = 10


def relate(files: list[DataFile]) -> NDArray[Any]:
    """Which files may share questions (F, F): itself, siblings. Siblings' odd rows are errors."""
    by_id = [{row.id: row for row in file.rows if row.id is not None} for file in files]
    related = np.eye(len(files), dtype=bool)
    for i, file in enumerate(files):
        for j in range(i):
            shared = by_id[i].keys() & by_id[j].keys()
            odd = [
                (by_id[i][key], by_id[j][key])
                for key in shared
                if normalized(by_id[i][key].question) != normalized(by_id[j][key].question)
            ]
            smaller = min(len(file.rows), len(files[j].rows))
            if not smaller or 2 * len(shared) <= smaller or 2 * len(odd) >= len(shared):
                continue
            related[i, j] = related[j, i] = True
            for mine, theirs in sorted(odd, key=lambda pair: pair[0].place.number):
                file.errors.append(
                    f"{mine.place}: id {mine.id} has another question in {theirs.place}"
                )
    return related


def compare_rows(
    file: DataFile, threshold: float, quiet: bool
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Report rows of one file that are near an earlier one under the same system message.

    Near in its question and in its answers (both of a contrast row), a row is a repetition: an
    error, like a row that is repeated as it is. Near in its question alone, or with an answer too
    short for a 3-gram, it may be meant: several answers to one question, problems of one form.
    Such rows are counted in a warning.

    Returns:
        The largest similarity of each question to another one (N), and of each answer to one of
        another row (N * S).
    """
    rows = file.rows
    if len(rows) < 2:
        return np.zeros(0), np.zeros(0)
    sides = len(rows[0].answers)
    size = len(rows)
    codes = {system: code for code, system in enumerate({row.system for row in rows})}
    system_N = np.array([codes[row.system] for row in rows])
    long_N = np.array([all(ngrams(text, 3) for text in row.answers) for row in rows])
    nearest_N, answer_NS = np.empty(size), np.empty((size, sides))
    again: list[str] = []
    alike: list[tuple[Place, Place]] = []
    asked = similarity_blocks([row.question for row in rows])
    said = similarity_blocks([text for row in rows for text in row.answers], BLOCK * sides)
    both = zip(asked, said, strict=True)
    total = -(-size // BLOCK)
    progress = tqdm(both, f"Comparing {file.path.name}", total, disable=quiet, delay=2, leave=False)
    for (block, question_RN), (_, flat) in progress:
        height = block.stop - block.start
        answer_RSNS = flat.reshape(height, sides, size, sides)
        # Not the other answer of the same row.
        answer_RSNS[np.arange(height), :, np.arange(block.start, block.stop)] = -1
        nearest_N[block] = question_RN.max(axis=1)
        answer_NS[block] = answer_RSNS.max(axis=(2, 3))
        earlier_RN = np.arange(size)[None, :] < np.arange(block.start, block.stop)[:, None]
        earlier_RN &= system_N[block, None] == system_N[None, :]
        near_RN = np.where(earlier_RN, question_RN, -1)
        whole_RN = np.where(long_N[None, :], near_RN, -1)
        for side in range(sides):
            whole_RN = np.minimum(whole_RN, answer_RSNS[:, side, :, side])
        for i in np.flatnonzero(near_RN.max(axis=1) >= threshold):
            row, share = rows[block.start + i], whole_RN[i].max()
            if row.place in file.repeated:
                continue
            if share < threshold:
                alike.append((row.place, rows[near_RN[i].argmax()].place))
                continue
            again.append(
                f"{row.place}: the row nearly repeats {rows[whole_RN[i].argmax()].place.short}: "
                f"question and answer share {share:.0%} of their 3-grams, or more"
            )
    file.errors += again[:_LISTED]
    if len(again) > _LISTED:
        file.errors.append(f"{file.path}: {len(again) - _LISTED} more rows nearly repeat another")
    if alike:
        second, first = alike[0]
        file.warnings.append(
            f"{file.path}: {len(alike)} questions share {threshold:.0%} or more of their 3-grams "
            f"with an earlier one, which may be meant ({second.short} with {first.short}, for one)"
        )
    return nearest_N, answer_NS.ravel()


def compare_files(
    files: list[DataFile], related: NDArray[Any], threshold: float, quiet: bool
) -> list[NDArray[Any]]:
    """Report questions that unrelated files share.

    Returns:
        For each file, the largest similarity of each question to one of an unrelated file; empty
        without such a file.
    """
    if related.all():
        return [np.zeros(0) for _ in files]
    rows = [(i, row) for i, file in enumerate(files) for row in file.rows]
    owner_N = np.array([i for i, _ in rows], dtype=np.int64)
    other_N = np.full(len(rows), np.nan)
    pairs: Counter[tuple[int, int]] = Counter()
    blocks = similarity_blocks([row.question for _, row in rows])
    total = -(-len(rows) // BLOCK)
    progress = tqdm(blocks, "Comparing files", total, disable=quiet, delay=2, leave=False)
    for block, jaccard_RN in progress:
        owner_R = owner_N[block]
        apart_RN = ~related[owner_R][:, owner_N]
        other_N[block] = np.where(apart_RN, jaccard_RN, -1).max(axis=1)
        # Against files named earlier only, so that a pair is told once.
        earlier_RN = np.where(apart_RN & (owner_N[None, :] < owner_R[:, None]), jaccard_RN, -1)
        best_R = earlier_RN.argmax(axis=1)
        for i in np.flatnonzero(earlier_RN.max(axis=1) >= threshold):
            (mine, row), (theirs, twin) = rows[block.start + i], rows[best_R[i]]
            pairs[mine, theirs] += 1
            if pairs[mine, theirs] <= _LISTED:
                how = _how_alike(row, twin, float(earlier_RN[i, best_R[i]]))
                files[mine].errors.append(f"{row.place}: its question {how} {twin.place}")
    for (mine, theirs), count in pairs.items():
        if count > _LISTED:
            files[mine].errors.append(
                f"{files[mine].path}: {count - _LISTED} more questions overlap with "
                f"{files[theirs].path}"
            )
    found = [other_N[owner_N == i] for i in range(len(files))]
    return [other[other >= 0] for other in found]  # -1 where there was nothing to compare with.


def _how_alike(row: Row, twin: Row, jaccard: float) -> str:
    if normalized(row.question) == normalized(twin.question):
        return "is also that of"
    return f"shares {jaccard:.0%} of its 3-grams with"
