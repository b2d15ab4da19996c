"""Models behind an Inspect provider string (extra `judge`), such as `openai/...` or `vllm/...`.

Retries, rate limits and connections are Inspect's own. API keys are read by its providers from the
environment; no message of ours contains one.
"""

from __future__ import annotations

import re
from typing import Any

from emarecipes._secrets import masked
from emarecipes.errors import UserError

# Inspect's own default is to retry for ever. Its waits double: these take some minutes.
_MAX_RETRIES = 6
SECONDS_AN_ATTEMPT = 300

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
    limits = {"max_retries": _MAX_RETRIES, "attempt_timeout": timeout}
    try:
        return get_model(name, config=GenerateConfig(**limits, **config))
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
        text = f"no reply in time, in {_MAX_RETRIES + 1} attempts"
    text = re.sub(r"\[/?(?:bold|blue)\]", "", text)
    text = re.sub(r"^\s*ERROR:\s*", "", text)
    return " ".join(masked(text).split())
