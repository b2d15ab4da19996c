"""torchtune's wrapper of a model for lm-evaluation-harness, without its download of GPT-2."""

from __future__ import annotations

from typing import Any

import torch
from torchtune.utils import get_device

from emarecipes._torchtune import stock_recipe


def harness_model(
    model: Any, tokenizer: Any, base: str, *, device: str | None, max_seq_len: int, batch_size: int
) -> Any:
    """A torchtune decoder as an lm-evaluation-harness model; needs `lm_eval` and `transformers`.

    torchtune's own `__init__` sets the harness's class up with GPT-2, fetched from the hub. Here it
    gets the base folder's shape without weights, and its tokenizer, which nothing but that class's
    own set-up reads.

    Args:
        model: The decoder.
        tokenizer: torchtune's model transform.
        base: The base model's folder, in Hugging Face's layout.
        device: The config's.
        max_seq_len: Tokens of a text.
        batch_size: Texts at a time.
    """
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoConfig, AutoModelForCausalLM

    stock = stock_recipe("eleuther_eval")._LLMEvalWrapper

    class Wrapper(stock):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            with torch.device("meta"):
                shape = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
            HFLM.__init__(self, pretrained=shape, tokenizer=base, backend="causal")
            self._model, self._tokenizer = model, tokenizer
            self._device = get_device(device or "cpu")
            self._max_seq_length, self._batch_size = max_seq_len, batch_size
            self._dtype, self._enable_kv_cache = next(model.parameters()).dtype, True

    return Wrapper()
