"""Persona vectors, their random control, and how well they tell held-out answers apart.

Shapes: N answers, P positive and M negative ones, K = layers + 1 residual indices, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

# Resamples of the held-out questions for the standard error.
_RESAMPLES = 400


def persona_vectors(activation_NKD: Tensor, positive_N: Tensor, used_N: Tensor) -> Tensor:
    r"""v_k = mean over positive answers of a_k - mean over negative answers of a_k, (K, D).

    a_k is an answer's activation at residual index k, itself a mean over the answer's tokens, so
    each answer counts alike.

    Source: Chen et al., 2025, "Persona Vectors: Monitoring and Controlling Character Traits in
    Language Models".

    Args:
        activation_NKD: Mean activation of each answer.
        positive_N: Boolean: the answer's system prompt calls up the trait.
        used_N: Boolean: the answers that count.
    """
    positive_KD = activation_NKD[positive_N & used_N].mean(dim=0)
    negative_KD = activation_NKD[~positive_N & used_N].mean(dim=0)
    return positive_KD - negative_KD


def random_vectors(vector_KD: Tensor, seed: int) -> Tensor:
    """The control: random directions, (K, D), each row of the norm of the same row given."""
    generator = torch.Generator().manual_seed(seed)
    normal_KD = torch.randn(vector_KD.shape, generator=generator)
    scale_K: Tensor = vector_KD.norm(dim=1) / normal_KD.norm(dim=1)
    return normal_KD * scale_K[:, None]


def persona_subspace(
    activation_NKD: Tensor, positive_N: Tensor, used_N: Tensor, pair_N: Tensor, rank: int
) -> Tensor | None:
    r"""The directions along which paired answers differ most, (K, R, D), orthonormal for each k.

    With the rows of X the differences a_k(positive) - a_k(negative) of the two answers to the same
    question under the two prompts of a pair, the first R right singular vectors of X. X is not
    centred: the mean difference, the persona vector, lies in them as a rule.

    Args:
        activation_NKD: Mean activation of each answer.
        positive_N: Boolean: the answer's system prompt calls up the trait.
        used_N: Boolean: the answers that count; a pair counts with both.
        pair_N: The number of the pair that an answer belongs to.
        rank: R, at most; fewer where there are fewer pairs. Rows beyond X's rank are 0.

    Returns:
        None where no pair has both answers.
    """
    place = {int(pair_N[n]): n for n in (positive_N & used_N).nonzero()[:, 0].tolist()}
    both = [
        (place[int(pair_N[n])], n)
        for n in (~positive_N & used_N).nonzero()[:, 0].tolist()
        if int(pair_N[n]) in place
    ]
    if not both:
        return None
    positive, negative = (list(side) for side in zip(*both, strict=True))
    return top_directions(activation_NKD[positive] - activation_NKD[negative], rank)


def top_directions(difference_XKD: Tensor, rank: int) -> Tensor:
    r"""For each k the first R right singular vectors of the differences, (K, R, D), orthonormal.

    Not centred. Each points where the mean difference does, as their signs are arbitrary else. Rows
    beyond the differences' rank are 0; there are fewer than R rows where there are fewer
    differences.
    """
    directions = []
    for difference_XD in difference_XKD.double().unbind(dim=1):
        _, values_X, right_XD = torch.linalg.svd(difference_XD, full_matrices=False)
        real_X = values_X > 1e-6 * values_X[0]
        side_X = torch.where(right_XD @ difference_XD.mean(dim=0) < 0, -1.0, 1.0)
        directions.append((right_XD * (real_X * side_X)[:, None])[:rank].float())
    return torch.stack(directions)


def wins(positive_P: Tensor, negative_M: Tensor) -> Tensor:
    """Mann-Whitney: (P, M), 1 where the positive is higher, 1/2 where both are the same, else 0."""
    higher_PM = (positive_P[:, None] > negative_M[None]).double()
    return higher_PM + 0.5 * (positive_P[:, None] == negative_M[None]).double()


def auc(positive_P: Tensor, negative_M: Tensor) -> float:
    """P(a positive is higher than a negative), ties as 1/2; nan if a side is empty."""
    if not len(positive_P) or not len(negative_M):
        return float("nan")
    return float(wins(positive_P, negative_M).mean())


def separation(
    activation_NKD: Tensor, vector_KD: Tensor, positive_N: Tensor, used_N: Tensor
) -> list[float]:
    """AUC of the projections <a_k, v_k> of positive against negative answers, one for each k."""
    score_NK = projections(activation_NKD, vector_KD)
    positive_PK, negative_MK = score_NK[positive_N & used_N], score_NK[~positive_N & used_N]
    return [auc(positive_PK[:, k], negative_MK[:, k]) for k in range(vector_KD.shape[0])]


def projections(activation_NKD: Tensor, vector_KD: Tensor) -> Tensor:
    """<a_k, v_k> / |v_k|, (N, K), in float64; 0 where v_k is 0, so that all answers tie."""
    unit_KD = normalize(vector_KD.double(), dim=1, eps=1e-300)
    return torch.einsum("nkd,kd->nk", activation_NKD.double(), unit_KD)


def separation_error(
    activation_NKD: Tensor,
    vector_KD: Tensor,
    positive_N: Tensor,
    used_N: Tensor,
    question_N: Tensor,
    seed: int,
) -> list[float]:
    """Standard error of `separation`, by resampling whole questions of the used answers.

    Answers to one question resemble one another, so a standard error over answers would be too
    small. The vector is held fixed. nan: one question tells nothing of others.
    """
    score_NK = projections(activation_NKD, vector_KD)
    questions = torch.unique(question_N[used_N])
    if len(questions) < 2:
        return [float("nan")] * vector_KD.shape[0]
    index_N = torch.searchsorted(questions, question_N)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(questions), (_RESAMPLES, len(questions)), generator=generator)
    weight_RQ = torch.nn.functional.one_hot(drawn, len(questions)).sum(dim=1).double()
    positive, negative = positive_N & used_N, ~positive_N & used_N
    weight_RP, weight_RM = weight_RQ[:, index_N[positive]], weight_RQ[:, index_N[negative]]
    pairs_R = weight_RP.sum(dim=1) * weight_RM.sum(dim=1)
    errors = []
    for k in range(vector_KD.shape[0]):
        wins_PM = wins(score_NK[positive, k], score_NK[negative, k])
        won_R = ((weight_RP @ wins_PM) * weight_RM).sum(dim=1)
        # A resample may hold answers of one side only: nothing to compare there.
        errors.append(float((won_R[pairs_R > 0] / pairs_R[pairs_R > 0]).std()))
    return errors
