"""Models behind an Inspect provider string (extra `judge`), such as `openai/...` or `vllm/...`.

Retries, rate limits and connections are Inspect's own. API keys are read by its providers from the
environment; no message of ours contains one.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from emarecipes._secrets import masked
from emarecipes.errors import UserError

# Inspect's own default is to retry for ever. Its waits double: these take some minutes.
MAX_RETRIES = 6
SECONDS_AN_ATTEMPT = 300

# A server that is not there at so many looks in a row has gone: it is named after some 20 seconds.
_LOOKS, _BETWEEN, _CONNECT = 3, 4.0, 3.0

_Result = TypeVar("_Result")

# Servers that take what a request leaves out from the model's generation_config.json, Qwen's
# repetition_penalty of 1.05 for one: sampled would be from other distributions than the config
# says. `openai-api` and others may lead to such a server too, but also to services that refuse it.
_MODEL_DEFAULTS = ("vllm", "sglang")
_OFF = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}


def provider_model(
    what: str, name: str, *, timeout: int = SECONDS_AN_ATTEMPT, **config: Any
) -> Any:
    """Inspect's model of that name, without asking it anything.

    Args:
        what: What it is for, in messages: `the judge`.
        name: An Inspect provider string, such as `openai/gpt-4o-mini`.
        timeout: Seconds that an attempt may take.
        config: For Inspect's GenerateConfig.

    Raises:
        UserError: Inspect or the provider's own package is not installed, there is no such
            provider, or it finds no API key. Some providers look for theirs at the first call only.
    """
    try:
        from inspect_ai.model import GenerateConfig, get_model
    except ImportError:
        raise UserError(
            f"{what.replace('the ', 'a ', 1)} needs inspect-ai, which is not installed: "
            "pip install 'emarecipes[judge]'"
        ) from None
    config = switched_off(name) | config
    limits = {"max_retries": MAX_RETRIES, "attempt_timeout": timeout}
    try:
        # Not kept by Inspect, which would hand out the same one again whatever address the
        # environment names by then.
        return get_model(name, config=GenerateConfig(**limits, **config), memoize=False)
    except Exception as error:
        raise UserError(f"{what} {name} cannot be used: {error_line(error)}") from None


def switched_off(name: str) -> dict[str, Any]:
    """What a request says so that a model's own sampling defaults do not hold; {} where it cannot.

    Args:
        name: An Inspect provider string.
    """
    known = name.partition("/")[0] in _MODEL_DEFAULTS
    return {"top_p": 1.0, "extra_body": dict(_OFF)} if known else {}


def error_line(error: BaseException) -> str:
    """An error of Inspect's as one line, without markup and without secrets."""
    if type(error).__name__ == "RetryError" and error.__cause__ is not None:
        error = error.__cause__  # The last attempt's own.
    text = str(getattr(error, "message", "") or error) or type(error).__name__
    if type(error).__name__ == "AttemptTimeoutError":
        text = f"no reply in time, in {MAX_RETRIES + 1} attempts"
    text = re.sub(r"\[/?(?:bold|blue)\]", "", text)
    text = re.sub(r"^\s*ERROR:\s*", "", text)
    return " ".join(masked(text).split())


def check_there(what: str, model: Any) -> None:
    """See that something answers at the model's address, where it is asked directly.

    Args:
        what: Who is asked, in messages.
        model: From `provider_model`.

    Raises:
        UserError: Nothing does.
    """
    address = _address(model)
    if address is None:
        return
    try:
        socket.create_connection(address, _CONNECT).close()
    except OSError as error:
        raise _not_there(what, address, _why(error)) from None


async def while_there(
    work: Callable[[], Awaitable[_Result]], what: str, model: Any, replies: Callable[[], int]
) -> _Result:
    """Await `work()`, but no longer than the model's server is there to be asked.

    Inspect asks again for minutes when a connection is refused, without a word. A server whose
    address is not known, or that is reached through a proxy, is not looked at.

    Args:
        work: Asks the model.
        what: Who is asked, in messages: `the judge openai-api/local/x`.
        model: From `provider_model`.
        replies: How many there are so far. While there are more and more, as from a cache, the
            server need not be there.

    Raises:
        UserError: Nothing has answered at the server's address three times in a row.
    """
    address = _address(model)
    if address is None:
        return await work()
    asking = asyncio.ensure_future(work())
    looking = asyncio.ensure_future(_gone(*address, replies))
    try:
        await asyncio.wait({asking, looking}, return_when=asyncio.FIRST_COMPLETED)
        if asking.done():
            return asking.result()
        raise _not_there(what, address, looking.result())
    finally:
        for task in (asking, looking):
            task.cancel()
        await asyncio.gather(asking, looking, return_exceptions=True)


def _not_there(what: str, address: tuple[str, int], why: str) -> UserError:
    host, port = address
    return UserError(
        f"{what} failed: no server answers at {host}:{port} ({why}); start it, or mend its address "
        "in the environment"
    )


def _why(error: OSError) -> str:
    return str(getattr(error, "strerror", None) or "no answer in time")


def _address(model: Any) -> tuple[str, int] | None:
    """Host and port of the server behind Inspect's model, where it is asked directly."""
    url = str(getattr(model.api, "base_url", None) or "")
    parts = urlsplit(url)
    try:
        host, port = parts.hostname, parts.port
    except ValueError:  # The provider's own message says what is wrong with the address.
        return None
    if not host or parts.scheme not in ("http", "https"):
        return None
    proxies = getproxies()
    if ({parts.scheme, "all"} & proxies.keys()) and not proxy_bypass(host):
        return None
    return host, port or (443 if parts.scheme == "https" else 80)


async def _gone(host: str, port: int, replies: Callable[[], int]) -> str:
    """Why nobody answers there, as soon as that is so; else it never ends."""
    missed, before = 0, replies()
    while True:
        if (now := replies()) > before:
            missed, before = 0, now
        try:
            # In a thread: until Python 3.12 `asyncio.wait_for` may miss that it is cancelled.
            (await asyncio.to_thread(socket.create_connection, (host, port), _CONNECT)).close()
            missed = 0
        except OSError as error:
            missed += 1
            if missed == _LOOKS:
                return _why(error)
        await asyncio.sleep(_BETWEEN)
