"""Our model for lm-evaluation-harness: its `hf` model with other logits and other answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torchtune.utils import get_device

from emarecipes.clock import midnight
from emarecipes.errors import UserError
from emarecipes.models.loss_head import LossHead
from emarecipes.models.sampling.draw import Sampling
from emarecipes.models.sampling.sampler import sample_batch


def harness_model(
    head: LossHead,
    base: str,
    *,
    device: str | None,
    max_seq_len: int,
    batch_size: int,
    date: str | None = None,
    template_arguments: dict[str, Any] | None = None,
) -> Any:
    """A torchtune decoder as an lm-evaluation-harness model; needs `lm_eval` and `transformers`.

    All but the forward and greedy decoding is the harness's own class for transformers' models:
    requests become tokens with the base folder's tokenizer and the beginning token that it adds, or
    does not. torchtune's wrapper of that class adds none, cuts answers at 256 tokens whatever the
    task says, and fetches GPT-2.

    Args:
        head: The model's loss head; gives the logits.
        base: The base model's folder, in Hugging Face's layout.
        device: The config's.
        max_seq_len: Tokens of a text; the model's own limit if that is lower.
        batch_size: Texts at a time.
        date: The day that the chat template is told instead of today; None: it reads no clock.
        template_arguments: Values of further variables of the chat template.
    """
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoConfig, AutoModelForCausalLM

    class HarnessModel(HFLM):
        def __init__(self) -> None:
            with torch.device("meta"):  # For its class: the shape, without weights.
                shape = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
            super().__init__(
                pretrained=shape,
                tokenizer=base,
                backend="causal",
                max_length=min(max_seq_len, head.model.max_seq_len),
                batch_size=batch_size,
                chat_template_args=template_arguments,
            )
            self._device = get_device(device or "cpu")
            self._stop_tokens = (*_end_tokens(base), self.tokenizer.eos_token_id)

        @torch.no_grad()
        def _model_call(self, inps: Tensor, **_: Any) -> Tensor:
            logits: Tensor = head.model(inps)
            return logits

        def _model_generate(
            self, context: Tensor, max_length: int, attention_mask: Tensor, **options: Any
        ) -> Tensor:
            if options.get("do_sample"):
                raise UserError("a task asks for sampled answers; only greedy ones are given")
            prompts = [
                row[real].tolist() for row, real in zip(context, attention_mask.bool(), strict=True)
            ]
            sampling = Sampling(max_length - context.shape[1], self._stop_tokens, temperature=0.0)
            found = sample_batch(head, prompts, [0] * len(prompts), sampling)
            # The class cuts the context's columns off, and leaves padding out when it decodes.
            answers = torch.full((len(found), sampling.max_new_tokens), self.tokenizer.pad_token_id)
            for row, answer in zip(answers, found, strict=True):
                row[: len(answer.tokens)] = torch.tensor(answer.tokens)
            return torch.cat([context, answers.to(context.device)], dim=1)

        def apply_chat_template(self, *chat: Any, **options: Any) -> str:
            with nullcontext() if date is None else _clock_stands_at(date):
                return str(super().apply_chat_template(*chat, **options))

        def get_model_info(self) -> dict[str, Any]:
            return {}  # The class would ask the hub about the folder.

    return HarnessModel()


@contextmanager
def _clock_stands_at(day: str) -> Iterator[None]:
    """transformers' templates are told this day.

    It offers no way: a function given as a variable of the template becomes its type's name (5.23).
    """

    class Day(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Day:
            return cls.fromisoformat(midnight(day).isoformat())

    with patch("transformers.utils.chat_template_utils.datetime", Day):
        yield


def _end_tokens(base: str) -> list[int]:
    """The tokens that end an answer, as transformers' `generate` finds them."""
    from transformers import AutoConfig, GenerationConfig

    try:
        config = GenerationConfig.from_pretrained(base)
    except OSError:  # There is no such file.
        config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(base))
    found = config.eos_token_id
    return [] if found is None else found if isinstance(found, list) else [found]
