"""Likelihoods of given answers: the same whether a prompt is read once or with every answer."""

from typing import Any

import pytest
import torch
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX as IGNORED
from toy_models import VOCAB_SIZE, toy_model

from emarecipes.models.batch import prompts_together
from emarecipes.models.likelihoods import GivenAnswers, answer_row
from emarecipes.models.loss_head import LossHead
from emarecipes.models.sampling.given import nll_by_prompt

FAMILIES = ["llama3_2", "qwen2_5", "gemma2", "phi3", "mistral"]


def drawn(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(VOCAB_SIZE, (count,), generator=generator).tolist()


def samples(opening: int = 9) -> list[dict[str, list[int]]]:
    """Three prompts with one opening, two to three answers each, in no order."""
    generator = torch.Generator().manual_seed(0)
    begins = drawn(opening, generator)
    prompts = [begins + drawn(n, generator) for n in (2, 7, 4)]
    rows = [
        answer_row(prompts[n], drawn(5 + 2 * n + m, generator)) for m in (0, 1) for n in range(3)
    ]
    rows.append(answer_row(prompts[1], drawn(3, generator)))
    for place in (2, 3):  # An answer that is trained in two pieces.
        rows[0]["labels"][len(prompts[0]) + place] = IGNORED
    return rows


def found(
    head: LossHead, rows: list[dict[str, list[int]]], *, once: bool, reference: bool = False
) -> dict[int, torch.Tensor]:
    answers = GivenAnswers(rows, 0, 4, torch.device("cpu"))
    every = [[row] for row in range(len(rows))]
    batches: Any = (
        nll_by_prompt(answers, head, 4, reference=reference)
        if once
        else answers.nll(head, every, reference=reference)
    )
    values: dict[int, torch.Tensor] = {}
    for numbers, nll_T, tokens_B in batches:
        assert not values.keys() & set(numbers)
        values |= dict(zip(numbers, nll_T.split(tokens_B.tolist()), strict=True))
    return values


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_that_is_read_once_changes_no_value(family: str, reference: bool) -> None:
    """Against every row alone and unpadded; Gemma-2 sees a window and reads as before."""
    head = LossHead(toy_model(family).eval())
    rows = samples()
    plain, once = (found(head, rows, once=way, reference=reference) for way in (False, True))
    assert sorted(once) == sorted(plain) == list(range(len(rows)))
    for row, values in plain.items():
        torch.testing.assert_close(once[row], values, atol=2e-5, rtol=0)
    assert "forward" not in vars(head.model.layers[0].attn)


def test_what_is_read() -> None:
    """Of seven answers to three prompts with one opening: it once a batch, each rest once."""
    head = LossHead(toy_model("llama3_2").eval())
    read: list[tuple[int, ...]] = []
    hook = head.model.tok_embeddings.register_forward_hook(
        lambda layer, given, output: read.append(tuple(given[0].shape))
    )
    found(head, samples(), once=True)
    hook.remove()
    # The last prompt's second batch has one prompt alone, which has no other to share with.
    assert read == [(1, 8), (2, 16), (4, 12), (1, 8), (2, 16), (3, 8)]


@pytest.mark.parametrize("short", [0, 1])
def test_a_row_that_begins_with_its_answer_is_read_whole(short: int) -> None:
    head = LossHead(toy_model("llama3_2").eval())
    rows = [*samples(), answer_row(list(range(10, 10 + short)), [30, 31, 32])]
    plain, once = (found(head, rows, once=way) for way in (False, True))
    for row, values in plain.items():
        torch.testing.assert_close(once[row], values, atol=2e-5, rtol=0)


def test_a_row_may_fill_the_model() -> None:
    """Padding behind the last position that the model has is given none."""
    head = LossHead(toy_model("llama3_2").eval())
    full = head.model.max_seq_len
    rows = [answer_row(list(range(full - 5)), [7, 8, 9, 10, 11]), answer_row([1, 2, 3], [4, 5])]
    plain, once = (found(head, rows, once=way) for way in (False, True))
    for row, values in plain.items():
        torch.testing.assert_close(once[row], values, atol=2e-5, rtol=0)


def test_batches_keep_answers_of_a_prompt_together() -> None:
    prompts = [[1], [2], [1], [3], [2]]
    assert prompts_together(prompts, [4, 9, 5, 5, 1], 2) == [[1, 4], [0, 2], [3]]
