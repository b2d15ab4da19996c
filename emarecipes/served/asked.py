"""Log-probabilities that a server gives tokens which it is given, where it has a way to.

No way is common to all. Each is tried on the first answer, in this order, with prompts in tokens,
so that no template and no tokenizer of the server's stands between:

- `prompt_logprobs` (vLLM): those of a prompt's own tokens, one answer at a time (docs/serving.md).
- `echo` (SGLang, OpenAI's older models): the same in another form.
- `logit_bias` (llama.cpp): one request a token; the bias makes it the chosen one, and its
  log-probability is that of the model before the bias.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np

from emarecipes.errors import UserError
from emarecipes.generation.served import base_urls
from emarecipes.provider import error_line, while_there
from emarecipes.served.figures import Floats
from emarecipes.served.here import Given

# What a server answers to a request that it does not know: the next way is tried.
_UNKNOWN = (400, 404, 405, 415, 422, 500, 501)
_BIAS = 1e4
_FIRST = 4

_Way = Callable[[Any, str, Given], Awaitable[list[float] | None]]


def score_served(
    model: Any, name: str, given: Sequence[Given], at_a_time: int, done: Callable[[], object]
) -> tuple[str, Floats] | None:
    """Log-probabilities (T,) of every token of the answers, and the way they were asked for.

    A token that the server gives none of is nan.

    Args:
        model: Inspect's, from `emarecipes.provider.provider_model`.
        name: The provider string, for messages.
        given: Prompts with their answers.
        at_a_time: Answers that are asked for side by side, where the way bears it.
        done: Called after each answer.

    Returns:
        None where the server has none of the ways.

    Raises:
        UserError: It cannot be reached, or refuses a later answer.
    """
    client = getattr(model.api, "client", None)
    if not hasattr(client, "completions") or not hasattr(model.api, "service_model_name"):
        return None
    called = model.api.service_model_name()
    replies = 0

    async def one(way: _Way, answer: Given, gate: asyncio.Semaphore) -> list[float]:
        nonlocal replies
        async with gate:
            try:
                found = await way(client, called, answer)
            except Exception as error:
                raise _failed(name, error) from None
        if found is None:
            raise UserError(f"{name}: gives log-probabilities of one answer, and none of another")
        replies += 1
        done()
        return found

    async def everything() -> tuple[str, Floats] | None:
        async with model:
            for way_name, way in WAYS.items():
                if await _knows(client, called, way, given, name):
                    gate = asyncio.Semaphore(1 if way is _prompt_logprobs else at_a_time)
                    parts = await asyncio.gather(*(one(way, answer, gate) for answer in given))
                    return way_name, np.array([value for part in parts for value in part])
        return None

    return asyncio.run(while_there(everything, f"the model {name}", model, lambda: replies))


async def _knows(client: Any, called: str, way: _Way, given: Sequence[Given], name: str) -> bool:
    """Whether a server has a way, by the first tokens of some answers."""
    for one in given[:_FIRST]:
        try:
            found = await way(client, called, Given(one.prompt, one.answer[:_FIRST]))
        except Exception as error:
            if getattr(error, "status_code", None) in _UNKNOWN:
                return False
            raise _failed(name, error) from None
        if found is not None and any(map(math.isfinite, found)):
            return True
    return False


def _failed(name: str, error: Exception) -> UserError:
    at = ", ".join(base_urls(name))
    return UserError(f"the model {name} failed{f' at {at}' if at else ''}: {error_line(error)}")


async def _complete(client: Any, called: str, prompt: list[int], **more: Any) -> dict[str, Any]:
    """The first choice of a completion of one token."""
    extra = more.pop("extra_body", {})
    reply = await client.completions.create(
        model=called, prompt=prompt, max_tokens=1, temperature=0.0, extra_body=extra, **more
    )
    choice: dict[str, Any] = reply.model_dump()["choices"][0]
    return choice


async def _prompt_logprobs(client: Any, called: str, given: Given) -> list[float] | None:
    tokens = [*given.prompt, *given.answer]
    choice = await _complete(client, called, tokens, extra_body={"prompt_logprobs": 0})
    found = choice.get("prompt_logprobs")
    if not isinstance(found, list) or len(found) != len(tokens):
        return None
    start = len(given.prompt)
    places = zip(given.answer, found[start:], strict=True)
    return [float(place[str(token)]["logprob"]) for token, place in places]


async def _echo(client: Any, called: str, given: Given) -> list[float] | None:
    tokens = [*given.prompt, *given.answer]
    choice = await _complete(client, called, tokens, echo=True, logprobs=1)
    found = (choice.get("logprobs") or {}).get("token_logprobs")
    if not isinstance(found, list) or len(found) < len(tokens):
        return None
    values = found[len(given.prompt) : len(tokens)]
    return None if None in values else [float(value) for value in values]


async def _logit_bias(client: Any, called: str, given: Given) -> list[float] | None:
    values: list[float] = []
    for place, token in enumerate(given.answer):
        prompt = [*given.prompt, *given.answer[:place]]
        bias = {str(token): _BIAS}
        choice = await _complete(client, called, prompt, logit_bias=bias, logprobs=1)
        # Empty where the token alone is no text, such as the first byte of a letter of several.
        content = (choice.get("logprobs") or {}).get("content")
        # By its number: another form of reply gives text alone, and the value after the bias.
        if content and content[0].get("id") != token:
            return None
        values.append(float(content[0]["logprob"]) if content else math.nan)
    return values


WAYS: dict[str, _Way] = {
    "prompt_logprobs": _prompt_logprobs,
    "echo": _echo,
    "logit_bias": _logit_bias,
}
