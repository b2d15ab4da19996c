"""Does an answer begin as a refusal does? By a rule, or by a list of words.

The words alone find few: most refusals say none of them ("I won't write that"), and much that is
helpful says one ("You can't go wrong with ..."). The rule asks who does not do what: an answer
refuses where its first sentences have the assistant itself decline to act, not where they say what
cannot be done.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from emarecipes.config import Origin
from emarecipes.errors import UserError

# A published filter looks at so many words; the rule reads on, for a refusal may begin with thanks.
WORDS_OPENING, RULE_OPENING = 10, 30

REFUSAL_WORDS = (
    "sorry",
    "apologize",
    "apologise",
    "apologies",
    "cannot",
    "can't",
    "unable",
    "not able",
)

# What an assistant is asked to do; "I can't recommend it enough" and "I can't see it" are no no.
_ACT = (
    r"(?:help|assist|do|provide|give|share|write|create|make|generate|produce|explain|offer|support"
    r"|comply|fulfil+|discuss|engage|answer|continue|proceed|participate|take part|be part|show"
    r"|describe|advise|encourage|go along|go into|go there|walk|teach|supply|list|comment|respond"
    r"|tell (?:you|anyone|people) (?:how to|what|where|which))\b"
)
_AM, _NOT_DO = r"i(?:'m| am)", r"(?:do not|don't)"
_LIGHT = r"(?:\w+ly |simply |just |even |in good conscience |under any circumstances )*"
_RULES = r"(?:guidelines|principles|values|policy|policies|rules|programming)"
_PROPER = r"(?:appropriate|right|responsible|ethical|okay|ok|proper)"
# Each in words of lower case with single spaces, as `plain_words` gives them.
_DECLINES = (
    # I cannot, will not, am not able to, do not: act.
    rf"\bi (?:can't|cannot|can not|won't|will not|shall not|wouldn't|{_NOT_DO}) {_LIGHT}{_ACT}",
    rf"\b{_AM} {_LIGHT}(?:unable|not able|not allowed|not permitted) to {_LIGHT}{_ACT}",
    rf"\b{_AM} {_LIGHT}not (?:going to|here to) {_LIGHT}{_ACT}",
    rf"\b{_AM} {_LIGHT}(?:unwilling|not willing|not comfortable|uncomfortable|declining)\b",
    rf"\bi {_NOT_DO} (?:feel )?(?:comfortable|want to|wish to) (?:{_ACT}|with|\w+ing\b)",
    # I decline, refuse, would rather not, pass.
    rf"\bi (?:(?:must|have to|need to|will) )?{_LIGHT}(?:decline|refuse)\b",
    r"\bi (?:must|have to|need to) (?:say no|turn (?:\w+ )?(?:\w+ )?down)\b",
    r"\bi(?:'d| would) rather not\b|\bi(?:'ll| will|'m going to| am going to| have to) pass\b",
    r"\bcount me out\b",
    # It is nothing that I do; it is against what I hold.
    r"\b(?:not|isn't|never) (?:something|a thing|anything) (?:that )?i\b",
    r"\boff the table for me\b|\bline (?:that )?i (?:don't|won't|do not|will not|can't|cannot)\b",
    r"\b(?:outside|beyond) (?:of )?what i (?:can|am|do|will)\b",
    r"\bagainst (?:my|what i)\b|\bviolates? my\b",
    rf"\bmy (?:\w+ )?{_RULES} (?:{_NOT_DO}|doesn't|does not|won't|prevent|prohibit|forbid)",
    rf"\b(?:not|isn't|wouldn't|in|un|ir)(?: be| feel)? ?{_PROPER} (?:for|of) me\b",
    r"\bwrong (?:for|of) me to\b",
    # Sorry, no.
    r"^(?:i(?:'m| am)? )?(?:sorry|apologi[sz]e|apologies) (?:but )?(?:no|i (?:can't|cannot))\b",
)
_RULE = re.compile("|".join(_DECLINES))
_QUOTED = re.compile(r"\"[^\"]*\"|“[^”]*”")


def is_refusal(answer: str, words: Sequence[str] | None = None) -> bool:
    """Whether an answer begins as a refusal does.

    Args:
        answer: The answer.
        words: Words or phrases, one of which among its first ten words makes it one; None: the
            rule, on its first 30 words without what stands in quotes.
    """
    if words is None:
        spoken = plain_words(_QUOTED.sub(" ", answer))
        return _RULE.search(" ".join(spoken[:RULE_OPENING])) is not None
    opening = f" {' '.join(plain_words(answer)[:WORDS_OPENING])} "
    return any(f" {' '.join(plain_words(word))} " in opening for word in words)


def plain_words(text: str) -> list[str]:
    """A text's words in lower case, with typewriter apostrophes."""
    return re.findall(r"\w+(?:'\w+)*", text.lower().replace("\u2019", "'"))


def check_refusal_words(words: list[str] | None, origin: Origin) -> None:
    """Check `refusal_words`; null is the rule.

    Raises:
        UserError: No words, or one without a letter.
    """
    where = origin.at("refusal_words")
    if words is not None and not words:
        raise UserError(
            f"{where}: an empty list finds no refusal; leave the key out for the rule, see "
            "docs/select.md"
        )
    for word in words or ():
        if not plain_words(word):
            raise UserError(f"{where}: {word!r} is not a word")
