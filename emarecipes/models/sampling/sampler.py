"""Samples answers from the model: batched, with a key-value cache.

torchtune.generation's `generate` is not used: it finds padding by the token's id, which in many
chat formats is also the token that ends a message; it keeps all logits; it has one random state for
the whole batch; and rows that have ended run on with the others.

Shapes: B batch, U different prompts in it, T prompt and answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from emarecipes.errors import UserError
from emarecipes.models.batch import longest_first
from emarecipes.models.loss_head import LossHead
from emarecipes.models.sampling.cache import caching
from emarecipes.models.sampling.draw import Noise, Sampling, draw
from emarecipes.models.sampling.reading import Prompts, last_position_only
from emarecipes.progress import Progress


@dataclass(frozen=True)
class Completion:
    """One answer: its tokens, without the one that ended it, and whether there was one."""

    tokens: list[int]
    stopped: bool


def sample_answers(
    head: LossHead,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    sampling: Sampling,
    *,
    batch_size: int,
) -> list[Completion]:
    """Draw one answer to each prompt, see `sample_batch`.

    Args:
        head: The model's loss head; gives the logits.
        prompts: Token ids, generation prompt included.
        seeds: One a prompt.
        sampling: Length, temperature and so on.
        batch_size: Rows at a time.

    Returns:
        The answers, in the order of the prompts.
    """
    answers: dict[int, Completion] = {}
    with Progress(total=len(prompts), unit="answer", desc="sampling") as bar:
        # A prompt is read once for all its samples in a batch.
        for rows in longest_first(prompts, batch_size, equal_together=True):
            batch = sample_batch(
                head, [prompts[row] for row in rows], [seeds[row] for row in rows], sampling
            )
            answers.update(zip(rows, batch, strict=True))
            bar.update(len(rows))
    return [answers[row] for row in range(len(prompts))]


@torch.no_grad()
def sample_batch(
    head: LossHead,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    sampling: Sampling,
) -> list[Completion]:
    """Draw one answer to each prompt of a batch.

    An answer depends on its own prompt and seed alone: each row draws from a generator of its own.
    What other rows share its batch changes its logits by rounding only, which in bf16 can turn a
    close draw. What all prompts begin with, such as a system prompt, is read once. Rows that have
    ended leave the batch.

    Raises:
        UserError: The logits are not finite.
    """
    model = head.model
    device = model.tok_embeddings.weight.device
    stop = torch.tensor(sampling.stop_tokens, device=device, dtype=torch.long)
    different = list(dict.fromkeys(map(tuple, prompts)))
    reading = Prompts(head, different, sampling.max_new_tokens)
    size, real_UT = reading.size, reading.real_UT
    noise = Noise(seeds, model.tok_embeddings.num_embeddings)
    answers: list[list[int]] = [[] for _ in prompts]
    stopped = [False] * len(prompts)
    running = list(range(len(prompts)))  # The batch's rows, by their number among the prompts.

    with caching(model, real_UT.shape[1]) as caches, last_position_only(head):
        logits_UV = reading.read(caches)
        if not logits_UV.isfinite().all():
            raise UserError("the model's logits are not finite; try dtype=fp32")
        source_B = torch.tensor([different.index(tuple(p)) for p in prompts], device=device)
        logits_BV, real_BT = logits_UV[source_B], real_UT[source_B]
        length_B1 = real_BT[:, :size].sum(dim=1, keepdim=True)
        for cache in caches:
            cache.select(source_B)
        padded = bool((length_B1 < size).any())
        for end in range(size + 1, real_BT.shape[1] + 1):
            token_B = draw(logits_BV, noise, sampling)
            ended = torch.isin(token_B, stop).tolist()
            for row, token, has_ended in zip(running, token_B.tolist(), ended, strict=True):
                stopped[row] = has_ended
                if not has_ended:
                    answers[row].append(token)
            if any(ended):
                kept = [place for place, has_ended in enumerate(ended) if not has_ended]
                running = [running[place] for place in kept]
                noise.keep(kept)
                kept_B = torch.tensor(kept, device=device, dtype=torch.long)
                token_B, real_BT, length_B1 = token_B[kept_B], real_BT[kept_B], length_B1[kept_B]
                for cache in caches:
                    cache.select(kept_B)
            if not running or end == real_BT.shape[1]:
                break
            mask_B1T = real_BT[:, None, :end] if padded else None
            position_B1 = length_B1 + (end - 1 - size)
            logits_BV = model(token_B[:, None], mask=mask_B1T, input_pos=position_B1)[:, -1]
    return [Completion(*answer) for answer in zip(answers, stopped, strict=True)]
