"""Draws the next token from logits, with random numbers that depend on the answer alone.

Gumbel's trick in two stages. With q independent exponential noise, argmax p / q is a draw from p;
applied to the whole vocabulary it takes a random number for every token and row, which costs more
than the rest of the sampling. So the vocabulary is cut into blocks of 256: first a block is drawn
from the blocks' masses, then a token from the block. That takes V / 256 + 256 numbers instead of V,
and is as exact.

Unlike a search in the cumulative distribution, an error of eps in the logits changes a draw with
a probability of the order of eps only, and two models that differ little draw much the same answers
from one seed: arms of a comparison share their noise.

Shapes: B batch, V vocabulary, K blocks, N = K + 256 random numbers a token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_BLOCK = 256
# Tokens that are looked at first for top_p; more if their mass does not reach it.
_NUCLEUS = 256


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        max_new_tokens: An answer's largest number of tokens.
        stop_tokens: An answer ends before the first of these.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Draw from the k most likely tokens only.
        top_p: Draw from the smallest set of most likely tokens whose mass reaches top_p, after
            top_k; tokens as likely as the last of either belong to it too.
    """

    max_new_tokens: int
    stop_tokens: tuple[int, ...]
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on all parts and on nothing else."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


class Noise:
    """Exponential noise for `draw`: a generator a row, N numbers a token.

    The t-th token of a row sees the t-th N numbers of its generator, whatever other rows do. They
    are drawn on the CPU, so that every device sees the same.

    Args:
        seeds: One a row.
        vocabulary: V.
    """

    def __init__(self, seeds: Sequence[int], vocabulary: int) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._size = -(-vocabulary // _BLOCK) + _BLOCK

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        self._generators = [self._generators[row] for row in rows]

    def next(self, device: torch.device) -> Tensor:
        """The next token's noise, float32 (B, N)."""
        noise_BN = torch.empty(len(self._generators), self._size)
        for row, generator in zip(noise_BN, self._generators, strict=True):
            row.exponential_(generator=generator)
        # Zero can be drawn, and 0 / 0 would win every argmax.
        return noise_BN.clamp_min_(torch.finfo(torch.float32).tiny).to(device)


def draw(logits_BV: Tensor, noise: Noise, sampling: Sampling) -> Tensor:
    """One token a row, (B,).

    Args:
        logits_BV: The model's, in any precision.
        noise: Rows as those of the logits. Not used at temperature 0.
        sampling: Temperature, top_k, top_p.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    p_BV = torch.softmax(logits_BV.float() / sampling.temperature, dim=-1)
    if sampling.top_k is not None and sampling.top_k < p_BV.shape[1]:
        least_B1 = p_BV.topk(sampling.top_k).values[:, -1:]
        p_BV = p_BV.masked_fill(p_BV < least_B1, 0.0)
    if sampling.top_p < 1:
        p_BV = p_BV.masked_fill(p_BV < _least_of_nucleus(p_BV, sampling.top_p), 0.0)
    noise_BN = noise.next(p_BV.device)
    p_BKN = F.pad(p_BV, (0, -p_BV.shape[1] % _BLOCK)).unflatten(1, (-1, _BLOCK))
    block_B = (p_BKN.sum(dim=-1) / noise_BN[:, :-_BLOCK]).argmax(dim=-1)
    row_B = torch.arange(len(block_B), device=block_B.device)
    inside_B = (p_BKN[row_B, block_B] / noise_BN[:, -_BLOCK:]).argmax(dim=-1)
    drawn_B: Tensor = block_B * _BLOCK + inside_B
    return drawn_B


def _least_of_nucleus(p_BV: Tensor, top_p: float) -> Tensor:
    """The smallest probability that belongs to each row's nucleus, (B, 1)."""
    enough_B1 = top_p * p_BV.sum(dim=-1, keepdim=True)
    size = _NUCLEUS
    while True:
        # Sorting the whole vocabulary would cost more than a small model's forward.
        top_BM = p_BV.topk(min(size, p_BV.shape[1])).values
        mass_BM = top_BM.cumsum(dim=-1)
        if size >= p_BV.shape[1] or bool((mass_BM[:, -1:] >= enough_B1).all()):
            break
        size *= 8
    # A token belongs to it if the tokens before it do not reach the mass.
    count_B1 = (mass_BM < enough_B1).sum(dim=-1, keepdim=True).clamp_max(top_BM.shape[1] - 1)
    return top_BM.gather(1, count_B1)
