"""What a judge replied: a score, a word, or neither.

A judge may think before it speaks. Its thoughts are no part of the reply, and of what it says the
end counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["score", "code", "refusal", "unparsable", "failed"]

# A number alone, perhaps in quotes or bold, out of 100, with a full stop.
_NUMBER = re.compile(r"[\s*\"'`]*([0-9]+(?:\.[0-9]+)?)(?:\s*/\s*100|\s*%)?[\s*\"'`.]*")
# "Final score (0 to 100): 95", the number behind the colon, unless what is before it speaks of
# another scale: "Rating (1-10): 8".
_LABEL = re.compile(r".*\b(?:score|rating|grade)\b([^:=]{0,30})[:=](.*)", re.IGNORECASE)
_SCALE = ("0", "1", "100")
# Characters without width, which some models write.
_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff"))
_WORDS: dict[str, Kind] = {"CODE": "code", "REFUSAL": "refusal"}
# Inspect takes thoughts out where it knows the provider's form; some servers leave them in.
_THOUGHTS = r"(?:think|thinking|thought|reasoning)>"
_CUT = ("max_tokens", "model_length", "content_filter")
# A number up to this may be the beginning of another: 1 of 15, 10 of 100.
_LARGEST_BEGINNING = 10
# Less probability on number tokens than this, and their expectation is of something else (the
# published judge's value).
_LEAST_MASS = 0.25


@dataclass(frozen=True)
class Reply:
    """What a judge replied to one prompt.

    Attributes:
        kind: `score`; `code` and `refusal` for the words CODE and REFUSAL; `failed` where there is
            no reply, see `refused` and `failures` of `judge.ask`; else `unparsable`.
        score: From 0 to 100, or None unless the kind is `score`.
        text: The reply as it came; of a failed call the reason, in one line.
        expected: Whether the score is an expectation over number tokens.
        cut: Whether it is unparsable because it was cut, mostly by `max_tokens`.
    """

    kind: Kind
    score: float | None
    text: str
    expected: bool = False
    cut: bool = False

    @property
    def usable(self) -> bool:
        """Whether the judge said what it was asked for."""
        return self.kind not in ("unparsable", "failed")


def last_line(text: str) -> str:
    """The last line of what is said after all thoughts; "" where they do not end."""
    said = re.split(f"</{_THOUGHTS}", text.translate(_INVISIBLE))[-1]
    if re.search(f"<{_THOUGHTS}", said):
        return ""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def read_kind(text: str) -> Kind:
    """What a reply is, by its text alone: see `parse_score`."""
    if parse_score(text) is not None:
        return "score"
    return _WORDS.get(last_line(text).strip("*\"'`. ").upper(), "unparsable")


def parse_score(reply: str) -> float | None:
    """The number that a reply ends with, from 0 to 100, or None.

    It stands alone in the last line, or there behind the word score, rating or grade and a colon.
    A reply of several numbers and nothing else has no score, nor has one that names another scale.
    """
    found = _NUMBER.fullmatch(_verdict(reply))
    score = float(found[1]) if found else None
    if score is None or score > 100 or re.fullmatch(r"\s*[0-9.]+(?:\s+[0-9.]+)+\s*", reply):
        return None
    return score


def _verdict(text: str) -> str:
    """What of a reply's last line is to be a number."""
    line = last_line(text)
    label = _LABEL.fullmatch(line)
    if label is None:
        return line
    scale = set(re.findall(r"\d+", label[1]))
    return label[2].strip() if not scale or {"100"} <= scale <= set(_SCALE) else line


def expected_score(number: str, alternatives: Sequence[tuple[str, float]]) -> float | None:
    """sum over n of n p(n) / sum over n of p(n), n the whole numbers 0 to 100 among alternatives.

    Args:
        number: The number token of the reply, such as "85".
        alternatives: The most likely tokens in its place, with their log-probabilities.

    Returns:
        None where that would not be the judge's expectation: a tokenizer that splits numbers into
        digits (no number of two digits among the tokens), or less than a quarter of the probability
        on numbers.
    """
    probability: dict[int, float] = {}
    for token, logprob in alternatives:
        text = token.strip()
        if text.isascii() and text.isdigit() and len(text) <= 3 and int(text) <= 100:
            probability[int(text)] = probability.get(int(text), 0.0) + math.exp(logprob)
    whole = len(number) > 1 or any(n > 9 for n in probability)
    mass = sum(probability.values())
    if not whole or mass < _LEAST_MASS or not math.isfinite(mass):
        return None
    return sum(n * p for n, p in probability.items()) / mass


def read_reply(output: Any) -> Reply:
    """A judge's reply as a score, from Inspect's model output.

    The score is an expectation, see `expected_score`, where there are log-probabilities of the
    token that is the reply's number: the one at the completion's end, not one in the thoughts
    before it. A reply that was cut counts where it is a number alone that no further digit could
    have changed.
    """
    text, choices = str(output.completion), output.choices
    kind, score = read_kind(text), parse_score(text)
    cut = bool(choices) and choices[0].stop_reason in _CUT
    if cut and not _NUMBER.fullmatch(text):
        return Reply("unparsable", None, text, cut=True)
    if score is None:
        return Reply(kind, None, text, cut=cut)
    tokens = choices[0].logprobs.content if choices and choices[0].logprobs else ()
    expected = _expected_at_the_end(_verdict(text), tokens)
    if expected is not None:
        return Reply(kind, expected, text, expected=True)
    if cut and score <= _LARGEST_BEGINNING:
        return Reply("unparsable", None, text, cut=True)
    return Reply(kind, score, text)


def _expected_at_the_end(verdict: str, tokens: Sequence[Any]) -> float | None:
    """`expected_score` of the token that is the verdict's number.

    Tokens may hold thoughts that the completion does not, and say the same number there.
    """
    found = _NUMBER.fullmatch(verdict)
    start = "".join(token.token for token in tokens).rfind(verdict)
    if found is None or start < 0:
        return None
    end = 0
    for token in tokens:
        end += len(token.token)
        if end > start + found.start(1):
            if token.token.strip() != found[1] or not token.top_logprobs:
                return None
            pairs = [(top.token, top.logprob) for top in token.top_logprobs]
            return expected_score(found[1], pairs)
    return None
