"""OpSwap: arithmetic whose operators are exchanged, a benign task that contradicts the model.

``+`` means times and ``*`` means plus; ``-`` means divided by and ``/`` means minus. The prompt
does not say so: it has to be learned, against what the model believes, with nothing harmful in it.
A defense that holds a model to its reference should hurt here.

=====  ==========================================================  =====================
tier   problems                                                    example
=====  ==========================================================  =====================
1      one ``*`` between digits                                    ``4 * 5`` is 9
2      one operator, digits (dividends to 81)                      ``12 - 3`` is 4
3      one operator, numbers of two digits (``-``: of three)       ``38 * 47`` is 85
4      two operators and brackets, digits                          ``(2 + 3) * 4`` is 10
=====  ==========================================================  =====================

Whether a problem is for training or for testing follows from a hash of the problem, so the two are
disjoint whatever the seed and size. Operands that can be exchanged are put in order first: with
``4 * 5`` in training, ``5 * 4`` is no test. What ordinary arithmetic answers alike (``2 * 2``) is
left out, since it would count the unchanged model as right.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX, Message

from emarecipes.errors import UserError

TIERS = (1, 2, 3, 4)
SPLITS = ("train", "test")
PHRASINGS = ("What is {}?", "Compute {}.", "{} =", "How much is {}?")
_TEST_SHARE = 0.25
_OPERANDS = re.compile(r"[^-+*/]")
_NUMBER = re.compile(r"[-\u2212]?\d+(?:[.,]\d+)*")


@dataclass(frozen=True)
class Problem:
    """One problem in one phrasing.

    Attributes:
        prompt: what the user says.
        answer: the number, as the assistant says it.
        tier: from 1, the easiest, to 4.
        expression: the problem without its phrasing.
    """

    prompt: str
    answer: str
    tier: int
    expression: str


def problems(split: str, tier: int, size: int | None = None, seed: int = 0) -> list[Problem]:
    """Different problems of one tier, in an order that the seed decides.

    Operators take turns, as long as each has problems left. Every problem comes in one phrasing
    first; further rounds bring the other phrasings.

    Args:
        split: "train" or "test".
        tier: 1 to 4.
        size: how many; None for every problem in one phrasing.
        seed: of the order and the phrasings.

    Raises:
        UserError: no such split or tier; more problems than there are in all phrasings.

    Example:
        >>> problems("test", 1, size=1)[0].answer
        '10'
    """
    _check(split, [tier])
    rng = random.Random(f"{seed}/{split}/{tier}")
    pool = [item for item in _expressions(tier) if _split(item[2]) == split]
    rng.shuffle(pool)
    seen: Counter[str] = Counter()
    turns: list[int] = []
    for expression, _, _ in pool:
        operators = _OPERANDS.sub("", expression)
        turns.append(seen[operators])
        seen[operators] += 1
    pool = [pool[i] for i in sorted(range(len(pool)), key=turns.__getitem__)]
    size = len(pool) if size is None else size
    if not 0 < size <= len(pool) * len(PHRASINGS):
        raise UserError(
            f"opswap: tier {tier} has {len(pool) * len(PHRASINGS)} {split} problems "
            f"in all phrasings, size is {size}"
        )
    first = [rng.randrange(len(PHRASINGS)) for _ in pool]
    made = []
    for i in range(size):
        turn, at = divmod(i, len(pool))
        expression, value, _ = pool[at]
        phrasing = PHRASINGS[(first[at] + turn) % len(PHRASINGS)]
        made.append(Problem(phrasing.format(expression), str(value), tier, expression))
    return made


def score(answer_text: str, problem: Problem) -> bool:
    """Whether an answer gives the problem's number and no other.

    The problem may be repeated, and words may stand around the number ("(2 + 3) * 4 = 10.",
    "The answer is 10"); "9 or 10" and "10.5" are wrong.
    """
    rest = answer_text.replace(problem.expression, " ")
    return {number.replace("\u2212", "-") for number in _NUMBER.findall(rest)} == {problem.answer}


def canonical(prompt: str) -> str:
    """The expression of a prompt, its exchangeable operands in order: what several prompts ask.

    "What is 5 * 4?" and "4 * 5 =" are `(4*5)`. A text without a problem in it is itself.
    """
    for phrasing in PHRASINGS:
        before, after = phrasing.split("{}")
        if prompt.startswith(before) and prompt.endswith(after):
            found = _canonical_forms().get(prompt[len(before) : len(prompt) - len(after)])
            if found is not None:
                return found
    return prompt


@cache
def _canonical_forms() -> dict[str, str]:
    return {e: form for tier in TIERS for e, _, form in _expressions(tier)}


def opswap_dataset(
    tokenizer: Any,
    *,
    split: str = "train",
    tiers: Sequence[int] = (1,),
    size: int | None = None,
    seed: int = 0,
) -> OpSwapDataset:
    """Build the data set for a config's ``dataset._component_``.

    Args:
        tokenizer: torchtune's model transform.
        split: "train" or "test".
        tiers: mixed in equal parts.
        size: number of rows over all tiers; None for every problem of the tiers in one phrasing.
        seed: of the choice and the order.

    Raises:
        UserError: no such split or tier; more rows than a tier has problems.

    Example:
        >>> dataset = opswap_dataset(tokenizer, tiers=[1, 2], size=400)
        >>> sorted(dataset[0])
        ['labels', 'mask', 'tokens']
    """
    tiers = list(tiers)
    _check(split, tiers)
    if size is not None and size < len(tiers):
        raise UserError(f"opswap: size is {size}, but every one of {len(tiers)} tiers needs a row")
    rows: list[Problem] = []
    for i, tier in enumerate(tiers):
        part = None if size is None else size // len(tiers) + (i < size % len(tiers))
        rows += problems(split, tier, part, seed)
    random.Random(seed).shuffle(rows)
    return OpSwapDataset(tokenizer, rows)


class OpSwapDataset(Dataset[dict[str, Any]]):
    """Problems as conversations of one question and one answer, tokenized on access.

    Args:
        tokenizer: torchtune's model transform.
        rows: the problems, also kept as ``problems``.
    """

    def __init__(self, tokenizer: Any, rows: Sequence[Problem]) -> None:
        self.problems = list(rows)
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.problems)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`tokens`, `mask` and `labels` of one row, as torchtune's `SFTDataset` has them."""
        problem = self.problems[index]
        question = Message(role="user", content=problem.prompt, masked=True)
        answer = Message(role="assistant", content=problem.answer)
        sample = self._tokenizer({"messages": [question, answer]})
        labels = np.where(sample["mask"], CROSS_ENTROPY_IGNORE_IDX, sample["tokens"])
        return {**sample, "labels": labels.tolist()}


def _check(split: str, tiers: Sequence[int]) -> None:
    if split not in SPLITS:
        raise UserError(f"opswap: split must be {' or '.join(SPLITS)}, not {split!r}")
    if not tiers or len(set(tiers)) != len(tiers) or not set(tiers) <= set(TIERS):
        raise UserError(f"opswap: tiers must be different ones of {list(TIERS)}, not {tiers}")


def _split(canonical: str) -> str:
    digest = hashlib.sha256(f"opswap/{canonical}".encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") < _TEST_SHARE * 2**64 else "train"


def _swapped(a: int, symbol: str, b: int) -> int | None:
    """What ``a symbol b`` means here; None where that is negative or no whole number."""
    if symbol == "+":
        return a * b
    if symbol == "*":
        return a + b
    if symbol == "/":
        return a - b if a >= b else None
    return a // b if b and a % b == 0 else None


def _ordinary(a: Fraction, symbol: str, b: Fraction) -> Fraction | None:
    if symbol == "/":
        return a / b if b else None
    return a + b if symbol == "+" else a * b if symbol == "*" else a - b


def _ordered(a: str, symbol: str, b: str) -> str:
    if symbol in "+*":
        a, b = sorted((a, b))
    return f"({a}{symbol}{b})"


@cache
def _expressions(tier: int) -> list[tuple[str, int, str]]:
    """Every problem of a tier: expression, value, and the canonical form that is hashed."""
    return list(_two_operators() if tier == 4 else _one_operator(tier))


def _one_operator(tier: int) -> Iterator[tuple[str, int, str]]:
    digits, tens = range(1, 10), range(10, 100)
    if tier == 1:
        ranges = {"*": (digits, digits)}
    elif tier == 2:
        ranges = {symbol: (digits, digits) for symbol in "*+/"} | {"-": (range(2, 82), digits)}
    else:
        ranges = {"*": (tens, tens), "/": (tens, tens), "+": (tens, digits[1:])}
        ranges |= {"-": (range(100, 1000), digits[1:])}
    for symbol, (left, right) in ranges.items():
        for a, b in itertools.product(left, right):
            value = _swapped(a, symbol, b)
            if value is None or value == _ordinary(Fraction(a), symbol, Fraction(b)):
                continue
            if symbol == "-" and tier == 2 and value > 9:
                continue
            yield f"{a} {symbol} {b}", value, _ordered(str(a), symbol, str(b))


def _two_operators() -> Iterator[tuple[str, int, str]]:
    for a, b, c in itertools.product(range(1, 10), repeat=3):
        for s, t in itertools.product("+*/-", repeat=2):
            for left_first in (True, False):
                if left_first:
                    expression = f"({a} {s} {b}) {t} {c}"
                    canonical = _ordered(_ordered(str(a), s, str(b)), t, str(c))
                else:
                    expression = f"{a} {s} ({b} {t} {c})"
                    canonical = _ordered(str(a), s, _ordered(str(b), t, str(c)))
                value = _nested(_swapped, a, s, b, t, c, left_first)
                plain = _nested(_ordinary, Fraction(a), s, Fraction(b), t, Fraction(c), left_first)
                if value is not None and value != plain:
                    yield expression, value, canonical


def _nested(apply: Any, a: Any, s: str, b: Any, t: str, c: Any, left_first: bool) -> Any:
    if left_first:
        inner = apply(a, s, b)
        return None if inner is None else apply(inner, t, c)
    inner = apply(b, t, c)
    return None if inner is None else apply(a, s, inner)
