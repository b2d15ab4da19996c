"""Persona vectors: each formula against another computation, generation against greedy by hand."""

import math
from typing import Any

import pytest
import torch
from toy_models import VOCAB_SIZE, toy_model

from emarecipes.models.likelihoods import answer_row
from emarecipes.models.loss_head import LossHead
from emarecipes.models.sampling.draw import Sampling, derived_seed
from emarecipes.models.sampling.sampler import sample_answers
from emarecipes.persona.kept import kept
from emarecipes.persona.read import read_activations
from emarecipes.persona.vectors import (
    auc,
    persona_vectors,
    random_vectors,
    separation,
    separation_error,
)

FAMILIES = ["llama3_2", "qwen2_5", "gemma2", "phi3"]


def model_of(family: str) -> Any:
    # Gemma-2's sliding window is not supported while generating where rows are longer than it.
    overrides = {"sliding_window_size": 64} if family == "gemma2" else {}
    return toy_model(family, **overrides).eval()


def ragged(count: int, low: int, high: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high, (count,), generator=generator).tolist()
    return [torch.randint(VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


def final_logits(head: LossHead, tokens: list[int]) -> torch.Tensor:
    """Of the last position, by a plain forward over the whole row."""
    with torch.no_grad():
        return head.model(torch.tensor([tokens]))[0, -1]


# --- generation --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_greedy_is_unbatched_greedy_without_cache(family: str) -> None:
    head = LossHead(model_of(family))
    prompts = ragged(7, 3, 20)
    endless = sample_answers(
        head, prompts, range(7), Sampling(12, stop_tokens=(), temperature=0.0), batch_size=7
    )
    stop = (endless[0].tokens[3], endless[1].tokens[5])
    sampling = Sampling(max_new_tokens=12, stop_tokens=stop, temperature=0.0)
    found = sample_answers(head, prompts, range(7), sampling, batch_size=3)
    lengths = set()
    for prompt, completion in zip(prompts, found, strict=True):
        tokens: list[int] = []
        while len(tokens) < 12:
            token = int(final_logits(head, [*prompt, *tokens]).argmax())
            if token in stop:
                break
            tokens.append(token)
        assert completion.tokens == tokens
        assert completion.stopped == (len(tokens) < 12)
        lengths.add(len(tokens))
    assert len(lengths) > 1


def test_an_answer_depends_on_its_own_prompt_and_seed_alone() -> None:
    head = LossHead(model_of("llama3_2"))
    prompts, seeds = ragged(9, 3, 20), [derived_seed(0, row) for row in range(9)]
    sampling = Sampling(max_new_tokens=10, stop_tokens=(5,), temperature=1.0)
    together = sample_answers(head, prompts, seeds, sampling, batch_size=4)
    torch.manual_seed(1)
    for rows in ([8, 2, 5], [0], [1, 3, 4, 6, 7]):
        again = sample_answers(
            head, [prompts[r] for r in rows], [seeds[r] for r in rows], sampling, batch_size=2
        )
        assert again == [together[r] for r in rows]
    other = sample_answers(head, prompts, [seed + 1 for seed in seeds], sampling, batch_size=4)
    assert other != together
    assert head.model.unembed is head
    assert not head.model.caches_are_setup()


def test_sampled_tokens_follow_the_models_distribution() -> None:
    head = LossHead(model_of("llama3_2"))
    prompt, count = [3, 1, 4, 1, 5], 4000
    sampling = Sampling(max_new_tokens=1, stop_tokens=(), temperature=0.7, top_k=6)
    drawn = sample_answers(head, [prompt] * count, range(count), sampling, batch_size=500)
    top, ids = (final_logits(head, prompt) / 0.7).topk(6)
    expected = dict(zip(ids.tolist(), torch.softmax(top, 0).tolist(), strict=True))
    tokens = [completion.tokens[0] for completion in drawn]
    assert set(tokens) <= set(expected)
    for token, probability in expected.items():
        error = 4 * (probability * (1 - probability) / count) ** 0.5
        assert tokens.count(token) / count == pytest.approx(probability, abs=error)


# --- reading -----------------------------------------------------------------------------------


def slow_reading(
    model: Any, prompt: list[int], answer: list[int]
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Activations (K, D), squared norms (K,) and log-likelihood of one answer, by hooks.

    In float64, but for torchtune's RMS norm, which computes in float32.
    """
    outputs: list[torch.Tensor] = []
    modules = [model.tok_embeddings, *model.layers]
    hooks = [m.register_forward_hook(lambda m, i, out: outputs.append(out)) for m in modules]
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer]]))[0]
    for hook in hooks:
        hook.remove()
    activations, squares = [], []
    for output in outputs:
        at_answer = output[0, len(prompt) :]
        activations.append(at_answer.mean(dim=0))
        squares.append((at_answer**2).sum(dim=1).mean())
    total = 0.0
    for position, token in enumerate(answer, start=len(prompt)):
        row = logits[position - 1].double()
        total += float(row[token] - row.logsumexp(dim=0))
    return torch.stack(activations), torch.stack(squares), total / len(answer)


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_and_vectors_against_hooks_in_float64(family: str) -> None:
    prompts, answers = ragged(8, 3, 20), ragged(8, 1, 14, seed=1)
    model = model_of(family)
    head = LossHead(model, chunk_elements=3 * VOCAB_SIZE)
    given = [answer_row(p, a) for p, a in zip(prompts, answers, strict=True)]
    reading = read_activations(head, given, batch_size=3, label="", reference=False)
    assert head.model.unembed is head

    slow = model_of(family).double()
    LossHead(slow)  # Puts Gemma-2's soft cap where it belongs.
    rows = [slow_reading(slow, p, a) for p, a in zip(prompts, answers, strict=True)]
    expected_NKD = torch.stack([activations for activations, _, _ in rows])
    assert expected_NKD.dtype == torch.float64
    torch.testing.assert_close(reading.activation_NKD.double(), expected_NKD, rtol=1e-4, atol=1e-5)
    squares_NK = torch.stack([squares for _, squares, _ in rows])
    torch.testing.assert_close(reading.square_NK.double(), squares_NK, rtol=1e-4, atol=1e-5)
    likelihood = torch.tensor([value for _, _, value in rows], dtype=torch.float64)
    torch.testing.assert_close(reading.log_likelihood_N.double(), likelihood, rtol=1e-4, atol=1e-5)

    positive = torch.tensor([True, False, True, True, False, False, True, False])
    used = torch.tensor([True, True, False, True, True, True, True, False])
    found_KD = persona_vectors(reading.activation_NKD, positive, used)
    by_hand_KD = (expected_NKD[0] + expected_NKD[3] + expected_NKD[6]) / 3 - (
        expected_NKD[1] + expected_NKD[4] + expected_NKD[5]
    ) / 3
    assert found_KD.shape == (len(model.layers) + 1, 32)
    torch.testing.assert_close(found_KD.double(), by_hand_KD, rtol=1e-4, atol=2e-5)


# --- keeping, control, separation --------------------------------------------------------------


def test_keep_rules() -> None:
    own, opposite = torch.tensor([-1.0, -2.0, -1.5]), torch.tensor([-1.5, -1.0, -1.5])
    assert kept(own, opposite, "likelihood").tolist() == [True, False, False]
    assert kept(own, opposite, "all").tolist() == [True, True, True]


def test_random_control_has_the_norms_and_not_the_directions() -> None:
    vector_KD = torch.randn(5, 400, generator=torch.Generator().manual_seed(3))
    vector_KD *= torch.tensor([0.1, 1.0, 3.0, 10.0, 100.0])[:, None]
    random_KD = random_vectors(vector_KD, seed=1)
    torch.testing.assert_close(random_KD.norm(dim=1), vector_KD.norm(dim=1))
    cosines = torch.cosine_similarity(random_KD, vector_KD)
    assert cosines.abs().max() < 0.2  # 4 standard deviations of 1 / sqrt(400)
    assert torch.equal(random_KD, random_vectors(vector_KD, seed=1))
    assert not torch.equal(random_KD, random_vectors(vector_KD, seed=2))


def test_auc_by_hand() -> None:
    # Pairs (positive, negative): 3>1, 3>2, 3=3; 1=1, 1<2, 1<3: 2 + 1/2 + 1/2 of 6.
    assert auc(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0, 3.0])) == 0.5
    assert auc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 0.0])) == 1.0
    assert auc(torch.tensor([2.0]), torch.tensor([2.0, 2.0])) == 0.5
    assert auc(torch.tensor([0.0, 1.0, 5.0]), torch.tensor([4.0])) == pytest.approx(1 / 3)
    assert auc(torch.tensor([]), torch.tensor([1.0])) != auc(torch.tensor([]), torch.tensor([1.0]))


def test_separation_projects_each_index_on_its_own_vector() -> None:
    vector_KD = torch.tensor([[1.0, 0.0], [0.0, -2.0]])
    activation_NKD = torch.tensor(
        [
            [[2.0, 9.0], [9.0, 1.0]],
            [[1.0, 9.0], [9.0, 2.0]],
            [[0.0, 9.0], [9.0, 0.0]],
            [[9.0, 9.0], [9.0, 9.0]],  # Not used.
        ]
    )
    positive = torch.tensor([True, True, False, False])
    used = torch.tensor([True, True, True, False])
    assert separation(activation_NKD, vector_KD, positive, used) == [1.0, 0.0]


def test_standard_error_counts_questions_not_answers() -> None:
    """Two questions, one always won and one always lost: a resample is 1, 1/2-ish or 0."""
    copies = 50
    score = torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(copies)
    positive = torch.tensor([True, False, True, False]).repeat(copies)
    question = torch.tensor([0, 0, 1, 1]).repeat(copies)
    everything = torch.ones(4 * copies, dtype=torch.bool)
    arguments = (score[:, None, None], torch.ones(1, 1), positive, everything)
    (error,) = separation_error(*arguments, question, seed=0)
    # Resamples: both 0 (AUC 1), both 1 (AUC 0), one of each (AUC 1/2): variance 1/8.
    assert error == pytest.approx(0.125**0.5, abs=0.03)
    # Questions that are not used are not drawn, and one alone tells nothing of others.
    scores = torch.cat([score, torch.ones(600)])[:, None, None]
    more = (torch.ones(1, 1), torch.cat([positive, positive, positive, positive]))
    used = torch.arange(800) < 200
    numbers = torch.cat([question, torch.arange(600)])
    assert separation_error(scores, *more, used, numbers, seed=0) == [error]
    assert math.isnan(separation_error(*arguments, torch.zeros_like(question), seed=0)[0])


def test_a_vector_that_is_0_separates_nothing() -> None:
    activation_NKD = torch.tensor([[[2.0, 9.0]], [[1.0, 9.0]]])
    sides, used = torch.tensor([True, False]), torch.ones(2, dtype=torch.bool)
    assert separation(activation_NKD, torch.zeros(1, 2), sides, used) == [0.5]
