"""Drawing and decoding: against exact distributions, transformers' nucleus, and no cache."""

from typing import Any

import pytest
import torch
from toy_models import VOCAB_SIZE, toy_model
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from emarecipes.errors import UserError
from emarecipes.models.batch import longest_first
from emarecipes.models.loss_head import LossHead
from emarecipes.models.sampling.draw import Noise, Sampling, derived_seed, draw
from emarecipes.models.sampling.sampler import sample_answers, sample_batch


def drawn(logits_V: torch.Tensor, sampling: Sampling, count: int) -> torch.Tensor:
    """Counts of `count` draws, each with a seed of its own, (V,)."""
    noise = Noise([derived_seed(0, row) for row in range(count)], len(logits_V))
    tokens = draw(logits_V.expand(count, -1), noise, sampling)
    return torch.bincount(tokens, minlength=len(logits_V))


@pytest.mark.parametrize("vocabulary", [61, 256, 700])
def test_draws_follow_the_softmax(vocabulary: int) -> None:
    """Chi-squared over all tokens, two blocks' border and a padded last block included."""
    logits = 2.0 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(3))
    count = 20_000
    found = drawn(logits, Sampling(1, (), temperature=1.3), count).double()
    expected = count * torch.softmax(logits.double() / 1.3, dim=0)
    order = expected.argsort(descending=True)
    found, expected = found[order], expected[order]
    often = expected >= 5
    bins = [(found[often], expected[often])]
    rest = (found[~often].sum()[None], expected[~often].sum()[None])
    bins += [rest] if rest[1] > 0 else []
    chi2 = sum(float(((f - e) ** 2 / e).sum()) for f, e in bins)
    freedom = int(often.sum()) - 1 + len(bins) - 1
    # Mean plus 4 standard deviations of chi-squared.
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize(("top_k", "top_p"), [(None, 0.5), (None, 0.9), (9, 1.0), (9, 0.6)])
def test_the_support_is_that_of_transformers(top_k: int | None, top_p: float) -> None:
    logits = 1.5 * torch.randn(400, generator=torch.Generator().manual_seed(5))
    processed = logits[None].clone()
    if top_k is not None:
        processed = TopKLogitsWarper(top_k)(torch.tensor([[0]]), processed)
    if top_p < 1:
        processed = TopPLogitsWarper(top_p)(torch.tensor([[0]]), processed)
    expected = set(processed[0].isfinite().nonzero()[:, 0].tolist())
    count = 6000
    found = drawn(logits, Sampling(1, (), top_k=top_k, top_p=top_p), count)
    p = torch.softmax(processed[0], dim=0)
    assert set(found.nonzero()[:, 0].tolist()) <= expected
    likely = {token for token in expected if p[token] * count > 15}
    assert likely <= set(found.nonzero()[:, 0].tolist())
    error = 4 * (p * (1 - p) / count).sqrt() + 1 / count
    assert bool(((found / count - p).abs() <= error).all())


@pytest.mark.early
def test_a_flat_nucleus_needs_more_than_the_first_tokens() -> None:
    logits = torch.linspace(0, 0.01, 5000)
    found = drawn(logits, Sampling(1, (), top_p=0.5), 3000)
    p = torch.softmax(logits.double(), 0).flip(0)
    size = int((p.cumsum(0) < 0.5).sum()) + 1
    assert 2400 < size < 2500
    support = found.nonzero()[:, 0]
    assert int(support.min()) >= 5000 - size
    assert int(support.min()) < 5000 - size + 50


def test_noise_belongs_to_seed_and_position() -> None:
    one, many = Noise([7], 300), Noise([3, 7, 5], 300)
    device = torch.device("cpu")
    assert torch.equal(one.next(device)[0], many.next(device)[1])
    many.keep([1, 2])
    assert torch.equal(one.next(device)[0], many.next(device)[0])
    assert derived_seed(0, "a", 1, 2) != derived_seed(0, "a", 2, 1)


@pytest.mark.early
def test_small_errors_of_logits_hardly_change_draws() -> None:
    """Of 4000 draws from 49152 nearly even tokens; a search in the cumulative would lose some."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 49152, generator=generator)
    other = logits + 1e-6 * torch.randn(logits.shape, generator=generator)
    changed = 0
    for repeat in range(100):
        seeds = [derived_seed(repeat, row) for row in range(40)]
        pair = [draw(x, Noise(seeds, 49152), Sampling(1, ())) for x in (logits, other)]
        changed += int((pair[0] != pair[1]).sum())
    assert changed == 0


def ragged(count: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 20, (count,), generator=generator).tolist()
    return [torch.randint(VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


def by_hand(head: LossHead, prompt: list[int], seed: int, sampling: Sampling) -> tuple[Any, bool]:
    """One answer without cache, padding or batch."""
    noise, tokens = Noise([seed], VOCAB_SIZE), list[int]()
    while len(tokens) < sampling.max_new_tokens:
        with torch.no_grad():
            logits_1V = head.model(torch.tensor([[*prompt, *tokens]]))[:, -1]
        token = int(draw(logits_1V, noise, sampling)[0])
        if token in sampling.stop_tokens:
            return tokens, True
        tokens.append(token)
    return tokens, False


@pytest.mark.parametrize("opening", [0, 11])
@pytest.mark.parametrize("family", ["llama3_2", "qwen2_5", "gemma2", "phi3", "mistral"])
def test_batched_answers_are_those_without_cache(family: str, opening: int) -> None:
    """Shared prompts, rows that leave early, and Gemma-2's window of 4 and soft caps."""
    head = LossHead(toy_model(family).eval())
    prompts = [[*range(20, 20 + opening), *prompt] for prompt in ragged(4)]
    prompts = [*prompts, prompts[1], prompts[1], prompts[3]]
    seeds = [derived_seed(1, row) for row in range(7)]
    sampling = Sampling(14, stop_tokens=(5, 6, 7, 8), temperature=0.9, top_p=0.95)
    read: list[tuple[int, ...]] = []
    hook = head.model.tok_embeddings.register_forward_hook(
        lambda layer, given, output: read.append(tuple(given[0].shape))
    )
    found = sample_batch(head, prompts, seeds, sampling)
    hook.remove()
    # What all begin with is read once, in eights, where no window counts distances.
    assert (read[0] == (1, 8)) == (opening > 0 and family != "gemma2")
    expected = [by_hand(head, p, s, sampling) for p, s in zip(prompts, seeds, strict=True)]
    assert [(answer.tokens, answer.stopped) for answer in found] == expected
    assert len({len(answer.tokens) for answer in found}) > 1
    assert {stopped for _, stopped in expected} == {True, False}
    assert "forward" not in vars(head.model.layers[0].attn)


def test_a_prompt_that_another_begins_with_keeps_a_token_of_its_own() -> None:
    """Of 8 tokens seven could be read once, so none are; of 9, eight."""
    head = LossHead(toy_model("llama3_2").eval())
    sampling = Sampling(6, stop_tokens=(), temperature=0.9)
    for length in (8, 9):
        prompts = [list(range(20, 20 + length)), list(range(20, 24 + length))]
        found = sample_batch(head, prompts, [1, 2], sampling)
        expected = [by_hand(head, p, s, sampling) for p, s in zip(prompts, [1, 2], strict=True)]
        assert [(answer.tokens, answer.stopped) for answer in found] == expected


def test_batches_are_sorted_and_complete() -> None:
    prompts = [[1], [2, 2, 2], [3, 3], [2, 2, 2], [4, 4]]
    assert longest_first(prompts, 2, equal_together=True) == [[1, 3], [2, 4], [0]]
    # Rows of one length keep their order where equal ones need not be together.
    assert longest_first([[9], [1, 2], [1], [0, 1]], 3) == [[1, 3, 0], [2]]
    assert longest_first([], 3) == []


def test_logits_that_are_not_finite() -> None:
    model = toy_model("llama3_2").eval()
    with torch.no_grad():
        model.norm.scale.fill_(float("nan"))
    with pytest.raises(UserError, match="logits are not finite"):
        sample_answers(LossHead(model), [[1, 2]], [0], Sampling(3, ()), batch_size=1)
