"""Answers of a model that a server runs, through Inspect's model API (extra `judge`)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from omegaconf import DictConfig

from emarecipes.errors import UserError
from emarecipes.generation.answers import Asked
from emarecipes.models.sampling.draw import derived_seed
from emarecipes.provider import error_line, provider_model, while_there

_CUT = ("max_tokens", "model_length", "content_filter")
# Of a machine of one's own as a rule, where the model may come with a top_p of its own.
_SERVERS = ("openai-api/", "ollama/", "llama-cpp-python/")


def check_served(cfg: DictConfig) -> None:
    """See whether the served model can be asked, without asking it.

    Raises:
        UserError: See `emarecipes.provider.provider_model`.
    """
    _model(cfg)


def base_urls(served: str) -> list[str]:
    """Addresses that the environment gives for a provider string, without credentials.

    Inspect's providers read `<PROVIDER>_BASE_URL` (of `openai-api/x/...`: `X_BASE_URL`; some have
    further ones, such as `AZURE_OPENAI_BASE_URL`), else `INSPECT_EVAL_MODEL_BASE_URL`. The address
    of a server that Inspect starts itself is another each time, and not among them.
    """
    provider, _, rest = served.partition("/")
    service = rest.partition("/")[0] if provider == "openai-api" else provider
    wanted = {*service.upper().replace("-", "_").split("_"), "BASE", "URL"}
    found = {name: url for name, url in os.environ.items() if wanted <= set(name.split("_"))}
    urls = [url for _, url in sorted(found.items()) if url]
    fallback = os.environ.get("INSPECT_EVAL_MODEL_BASE_URL")
    return [_without_credentials(url) for url in urls or ([fallback] if fallback else [])]


def _without_credentials(url: str) -> str:
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2].lower()
    return urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))


def answer_served(
    cfg: DictConfig, asked: Sequence[Asked], done: Callable[[dict[str, Any]], object]
) -> None:
    """Ask for every answer, `batch_size` at a time.

    Each has a seed of its own, from the run's seed, question, paraphrase and sample. Whether that
    makes an answer the same again is up to the server.

    Args:
        cfg: With `served` and the sampling settings.
        asked: The answers.
        done: Called with each answer's line as soon as it is there.

    Raises:
        UserError: A call failed for good. What was answered until then has been handed over.
    """
    from inspect_ai.model import ChatMessageSystem, ChatMessageUser, GenerateConfig

    model = _model(cfg)
    if cfg.served.startswith(_SERVERS):
        print(
            f"{cfg.served}: a server's or model's own top_k, min_p and repetition penalty hold "
            "here; switch them off there (vllm: --generation-config vllm), or name the server as "
            "vllm/... or sglang/..., where it is done for you",
            flush=True,
        )

    answered = 0

    async def one(asked: Asked) -> None:
        nonlocal answered
        system = [] if asked.system is None else [ChatMessageSystem(content=asked.system)]
        config = GenerateConfig(seed=derived_seed(cfg.seed, *asked.key) % 2**31)
        try:
            output = await model.generate(
                [*system, ChatMessageUser(content=asked.question)], config=config
            )
        except Exception as error:
            raise UserError(f"the model {cfg.served} failed: {error_line(error)}") from None
        tokens = None if output.usage is None else output.usage.output_tokens
        stopped = output.stop_reason not in _CUT
        answered += 1
        done(asked.record(output.completion, stopped=stopped, tokens=tokens))

    async def everything() -> None:
        async with model:
            waiting = [asyncio.create_task(one(each)) for each in asked]
            try:
                await asyncio.gather(*waiting)
            finally:
                for task in waiting:
                    task.cancel()
                await asyncio.gather(*waiting, return_exceptions=True)

    what = f"the model {cfg.served}"
    asyncio.run(while_there(everything, what, model, lambda: answered))


def _model(cfg: DictConfig) -> Any:
    return provider_model(
        "the served model",
        cfg.served,
        temperature=cfg.temperature,
        max_tokens=cfg.max_new_tokens,
        max_connections=cfg.batch_size,
        # Some services refuse a top_p beside the temperature: only where it says something.
        **({"top_p": cfg.top_p} if cfg.top_p < 1 or cfg.served.startswith(_SERVERS) else {}),
    )
