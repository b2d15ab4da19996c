"""Scores that a judge model gives, through Inspect's model API (extra `judge`).

Retries, caching of replies and concurrency are Inspect's own. API keys are read by its providers
from the environment; no message of ours contains one.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from typing import Any

from emarecipes.errors import UserError
from emarecipes.provider import error_line, provider_model

# A number alone, perhaps in quotes or bold, out of 100, with a full stop.
_NUMBER = re.compile(r"[\s*\"'`]*([0-9]+(?:\.[0-9]+)?)(?:\s*/\s*100|\s*%)?[\s*\"'`.]*")


def check_judge(model_name: str) -> None:
    """See whether a judge can be asked, without asking it.

    Args:
        model_name: An Inspect provider string, such as `openai/gpt-4o-mini`.

    Raises:
        UserError: Inspect or the provider's own package is not installed, there is no such
            provider, or it finds no API key. Some providers look for theirs at the first call only.
    """
    _judge(model_name)


def grade(
    model_name: str, prompts: Sequence[str], *, progress: Callable[[int], object]
) -> list[float | None]:
    """The score that the judge replies to each prompt, at temperature 0.

    A score is the number that a reply consists of. Where a provider gives log-probabilities, the
    expectation over number tokens would be finer; that is a later step, not done here.

    Replies are in Inspect's cache for a week, so that asking the same again costs nothing.

    Args:
        model_name: An Inspect provider string, such as `openai/gpt-4o-mini`.
        prompts: Each asks for a bare number from 0 to 100.
        progress: Called with 1 after each reply.

    Returns:
        One score a prompt, in [0, 100]; None where the reply is anything else (REFUSAL, CODE, no
        text, words around a number, a number out of range).

    Raises:
        UserError: As `check_judge`; or a call failed for good. Nothing is skipped silently.
    """
    judge = _judge(model_name)

    async def ask(prompt: str) -> float | None:
        try:
            reply = await judge.generate(prompt, cache=True)
        except Exception as error:
            raise UserError(f"the judge {model_name} failed: {error_line(error)}") from None
        progress(1)
        return parse_score(reply.completion)

    async def ask_all() -> list[float | None]:
        async with judge:
            return await asyncio.gather(*(ask(prompt) for prompt in prompts))

    return asyncio.run(ask_all())


def parse_score(reply: str) -> float | None:
    """The number that a reply consists of, or None if it is anything else or not in [0, 100]."""
    found = _NUMBER.fullmatch(reply)
    score = float(found[1]) if found else None
    return score if score is not None and score <= 100 else None


def _judge(model_name: str) -> Any:
    """Inspect's model; the same one until `grade` closes it."""
    return provider_model("the judge", model_name, temperature=0.0)
