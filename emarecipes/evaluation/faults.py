"""What is wrong with a sampled answer as a text, whatever it says: by rule, and by likelihood.

Likelihoods are the reference's. tests/evaluation/test_faults.py shows that the measure fails word
salad, the question repeated and cut answers, and passes written ones.
"""

from __future__ import annotations

import math
import random
from collections import Counter

from emarecipes.datasets.refusals import plain_words

# Word n-grams by which an answer repeats itself, and the share of them that it may.
NGRAM, MAX_REPETITION = 4, 0.5
# The share of an answer's words that may be the question's own.
MAX_OVERLAP = 0.8
# In nats a token: by how much the answer has to be likelier than its words in another order. Fewer
# words than these say nothing about order.
MIN_ORDER, MIN_WORDS = 1.0, 5
# In nats: the end of an answer is less likely than this only where a sentence is not over.
MAX_ENDING = 6.0
_SENTENCE_ENDS = tuple(".!?:;)]}\"'`*\u2026\u3002\uff01\uff1f\u201d\u2019")


def repetition(text: str, n: int = NGRAM) -> float:
    """Share of a text's word n-grams that occurred in it before: 1 - different / all of them.

    0 says nothing twice; 'a b c d a b c d' has 1 of 5. NaN for fewer than n words.
    """
    words = plain_words(text)
    grams = Counter(zip(*(words[start:] for start in range(n)), strict=False))
    return 1 - len(grams) / grams.total() if grams else float("nan")


def overlap(question: str, answer: str) -> float:
    """Share of an answer's words that the question has too, in any order; NaN without words."""
    asked, words = set(plain_words(question)), plain_words(answer)
    return sum(word in asked for word in words) / len(words) if words else float("nan")


def shuffled(text: str) -> str:
    """The text's words in another order, the same one at every call."""
    words = text.split()
    random.Random(text).shuffle(words)
    return " ".join(words)


def faults(question: str, answer: str, *, cut: bool, order: float, ending: float) -> list[str]:
    """What is wrong with an answer; nothing if it hangs together.

    Args:
        question: What it answers.
        answer: Its text.
        cut: Whether the length limit ended it.
        order: NLL a token of its words shuffled, minus its own; NaN if that was not computed.
        ending: NLL of the token that ends it; NaN if it was cut.
    """
    words = plain_words(answer)
    found = {
        "empty": not words,
        "cut": cut or (ending > MAX_ENDING and not answer.rstrip().endswith(_SENTENCE_ENDS)),
        "repeats the question": len(words) >= MIN_WORDS and overlap(question, answer) > MAX_OVERLAP,
        "repeats itself": repetition(answer) > MAX_REPETITION,
        "word salad": len(words) >= MIN_WORDS and not math.isnan(order) and order < MIN_ORDER,
    }
    return [name for name, is_so in found.items() if is_so]
