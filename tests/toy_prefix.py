"""A chat template's prefix, its tokens, and what the float64 reference makes of them."""

from typing import Any

import fuzz_cases
import pytest
import reference_new_defenses
import torch
from reference import KeepFloat64, adapters, all_logits, cross_entropy, forward_row, to_float64
from reference_defenses import adapter_gradients
from toy_models import toy_model

from emarecipes.models import HFChatTokenizer

VOCABULARY = fuzz_cases.VOCABULARY
PREFIX = "<|im_start|>user\n"
SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HFChatTokenizer:
    folder = tmp_path_factory.mktemp("prefix") / "tokenizer"
    return HFChatTokenizer(str(fuzz_cases.write_toy_tokenizer(folder)))


def spelt(tokenizer: HFChatTokenizer, text: str) -> list[int]:
    """The tokens of a text with control tokens in it: of all else it has one a byte."""
    tokens = []
    while text:
        name = next((n for n in fuzz_cases.CONTROL if text.startswith(n)), None)
        tokens += [tokenizer.special_tokens[name]] if name else tokenizer.encode(text[0])
        text = text[len(name or "x") :]
    return tokens


def expected(
    family: str, micro: Any, tokens: list[int], stream: str, weight: float, threshold: float
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    double = to_float64(toy_model(family, vocab_size=VOCABULARY))
    found = []
    for on in (True, False):
        _, residuals = forward_row(double, torch.tensor([tokens]), on)
        with adapters(double, on=on), KeepFloat64():
            read = reference_new_defenses.prefix_keys_values(double, residuals, len(tokens), stream)
        found.append(read)
    drift = reference_new_defenses.prefix_anchor(found[0], found[1])
    term = reference_new_defenses.prefix_anchor(
        found[0], found[1], threshold=threshold, threshold_of="term"
    )
    ce = cross_entropy(all_logits(double, micro, True), micro)
    loss = ce + weight * term
    values = {"ce": float(ce.detach()), "prefix": float(term.detach())}
    values |= {"loss": float(loss.detach()), "drift": float(drift.detach())}
    return values, adapter_gradients(double, loss)
