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
from emarecipes.judges.reply import Reply, read_reply
from emarecipes.provider import SECONDS_AN_ATTEMPT, error_line, provider_model, while_there

# HTTP's for a request that will never be taken, and the words by which one of them is seen to be
# about what this prompt says or how long it is. Without them it is about how the request is made.
_REFUSED = (400, 403, 413, 422)
_ABOUT_THE_PROMPT = re.compile(
    r"content.?filter|content.?management|polic|moderat|safety|guardrail|responsible.?ai|flagged"
    r"|blocked|violat|prohibited|inappropriate|harmful|sensitive"
    r"|context|too (?:long|large|many)|max\w*[ _](?:\w+[ _])?(?:len|token|input)|exceed",
    re.IGNORECASE,
)


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
    """The scores of `ask` without log-probabilities; None where a reply is no score."""
    return [reply.score for reply in ask(model_name, prompts, progress=progress)]


def ask(
    model_name: str,
    prompts: Sequence[str],
    *,
    progress: Callable[[int], object],
    top_logprobs: int | None = None,
    max_tokens: int | None = None,
    max_connections: int | None = None,
    timeout: int = SECONDS_AN_ATTEMPT,
    refused: dict[str, str] | None = None,
    failures: int = 0,
) -> list[Reply]:
    """What the judge replies to each prompt, at temperature 0.

    See `read_reply` for what of a reply is its score.

    Replies are in Inspect's cache for a week, so that asking the same again costs nothing.

    Args:
        model_name: An Inspect provider string, such as `openai/gpt-4o-mini`.
        prompts: Each asks for a number from 0 to 100.
        progress: Called with 1 after each reply.
        top_logprobs: How many alternatives of a token to ask for; None: no log-probabilities.
        max_tokens: Of a reply; None leaves it to the provider.
        max_connections: Calls at a time; None leaves it to Inspect.
        timeout: Seconds that an attempt may take; one that takes longer is made again.
        refused: Reasons by prompt, where the service has refused the prompt itself, see
            `refused_request`: these are of the kind `failed` and not asked, and those that it
            refuses now are added. None: a refused prompt is a failure as any other.
        failures: Further calls that may fail for good and count as replies of the kind `failed`;
            they are not cached. One more is an error.

    Returns:
        One reply a prompt, in their order.

    Raises:
        UserError: As `check_judge`; more calls than `failures` failed for good; or all prompts are
            refused, which is no fault of theirs. Nothing is skipped silently.
    """
    options: dict[str, Any] = {
        "max_tokens": max_tokens,
        "max_connections": max_connections,
        "timeout": timeout,
    }
    if top_logprobs is not None:
        options |= {"logprobs": True, "top_logprobs": top_logprobs}
    judge = _judge(model_name, options)
    known = {} if refused is None else dict(refused)
    failed = replied = 0

    async def ask_one(prompt: str) -> Reply:
        nonlocal failed, replied
        try:
            if prompt in known:
                reply = Reply("failed", None, known[prompt])
            else:
                reply = read_reply(await judge.generate(prompt, cache=True))
        except Exception as error:
            refusal = None if refused is None else refused_request(error)
            line = error_line(refusal or error)
            if refusal is not None:
                known[prompt] = line
            else:
                failed += 1
            if failed > failures:
                raise UserError(f"the judge {model_name} failed: {line}") from None
            reply = Reply("failed", None, line)
        replied += 1
        progress(1)
        return reply

    async def ask_all() -> list[Reply]:
        async with judge:
            return await asyncio.gather(*(ask_one(prompt) for prompt in prompts))

    watched = while_there(ask_all, f"the judge {model_name}", judge, lambda: replied)
    replies = asyncio.run(watched)
    if refused is not None and replies and all(prompt in known for prompt in prompts):
        raise UserError(f"the judge {model_name} failed at every prompt: {replies[0].text}")
    if refused is not None:
        refused |= known
    return replies


def refused_request(error: BaseException | None) -> BaseException | None:
    """What of an error and its causes says that this prompt was refused; None for other errors.

    A content filter has stopped it, or it is too long: HTTP 400, 403, 413 or 422, and a text that
    says so. A 400 about anything else, such as a parameter that a server does not know, is a fault
    of the request, not of the prompt.

    The innermost, for Inspect's own quotes the whole request.
    """
    found = None
    while error is not None:
        # `code` is Google's; elsewhere it may be a word.
        if {getattr(error, name, None) for name in ("status_code", "code")} & set(_REFUSED):
            found = error
        error = error.__cause__
    return found if found is not None and _ABOUT_THE_PROMPT.search(error_line(found)) else None


def _judge(model_name: str, options: dict[str, Any] | None = None) -> Any:
    """Inspect's model, which `ask` closes."""
    return provider_model("the judge", model_name, temperature=0.0, **(options or {}))


def fill(template: str, question: str, answer: str) -> str:
    """Put question and answer in place; placeholders and braces within these stay as they are."""
    values = {"{question}": question, "{answer}": answer}
    return re.sub(r"\{question\}|\{answer\}", lambda found: values[found[0]], template)
