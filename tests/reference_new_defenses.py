"""Slow float64 references of the weight, token, prefix, direction and gradient defenses.

Nothing here is shared with the package under test: each function follows its paper's formula, a
number at a time. Where a formula leaves a choice open, the choice is a parameter.

A module's factors are A (R, in) and B (out, R), its W is (out, in); D is the model's width, P the
number of prefix tokens. A mean over tokens is one mean over all tokens of all micro-batches.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from reference import LogitsPerRow, Microbatch, Steer, labelled_positions, token_kl
from reference_defenses import Factors, Gradients, ResidualsPerRow, Weights
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

Latents = Callable[[Tensor], list[Tensor]]
"""``latents(h)`` of one residual vector (D,): one scalar a latent."""


def one_of(choice: str, *allowed: str) -> bool:
    """Whether ``choice`` is the first of the allowed ones."""
    if choice not in allowed:
        raise ValueError(f"{choice!r} is none of {allowed}")
    return choice == allowed[0]


def total(values: Sequence[Tensor]) -> Tensor:
    return sum(values, torch.zeros((), dtype=torch.float64))


def reduced(rows: Sequence[Sequence[Tensor]], reduction: str) -> Tensor:
    """Reduce one value a token, listed by row; 0 over nothing.

    mean: sum / number of tokens; sum; row_mean: mean over the rows with tokens of their means.
    """
    if not one_of(reduction, "row_mean", "mean", "sum"):
        values = [value for row in rows for value in row]
        return total(values) / (max(len(values), 1) if reduction == "mean" else 1)
    return reduced([[total(row) / len(row) for row in rows if row]], "mean")


def chosen_rows(micros: Sequence[Microbatch], samples: str) -> list[tuple[int, int]]:
    """(micro-batch, row) of the rows of source 'task' or 'safe', or of 'all'."""
    every = one_of(samples, "all", "task", "safe")
    pairs = [(m, b) for m, micro in enumerate(micros) for b in range(micro["tokens"].shape[0])]
    return [(m, b) for m, b in pairs if every or micros[m]["sources"][b] == samples]


def singular_values(a: Tensor, b: Tensor, cut: float = 1e-12) -> Tensor:
    """Singular values of B A, dense, those above ``cut`` times the largest: none for B A = 0."""
    values = torch.linalg.svdvals(b.double() @ a.double())
    return values[values > cut * values.max()]


def spectral_penalty(lora: Factors, count: str = "nonzero") -> Tensor:
    """Mean over modules of ||B A||_F / ||B A||_*: 1 at rank 1, 1 / sqrt(k) for k equal values.

    A module with B A = 0 adds 0; the mean is over the 'nonzero' modules or over 'all'. The LoRA
    scale cancels. The gradient is arbitrary where B A has a lower rank than R: compare elsewhere.
    """
    spectra = [singular_values(a, b) for a, b in lora.values()]
    ratios = [(s**2).sum().sqrt() / s.sum() for s in spectra if len(s) > 0]
    return total(ratios) / max(len(ratios) if one_of(count, "nonzero", "all") else len(lora), 1)


def spectrum(a: Tensor, b: Tensor, power: int = 1) -> dict[str, float]:
    """Stable rank sum_i s_i^2 / s_1^2, and entropy -sum_i p_i ln p_i of p_i = s_i^power / sum."""
    s = singular_values(a, b).detach()
    p = s**power / (s**power).sum()
    return {"stable_rank": float((s**2).sum() / s[0] ** 2), "entropy": float(-(p * p.log()).sum())}


def asft_penalty(
    lora: Factors, aligned: Weights, base: Weights, scale: float, reduction: str = "sum"
) -> Tensor:
    """AsFT: sum over modules (or 'mean') of ||(I - C) s B A||_F^2, everything (out, out) dense.

    C = V V^T / ||V||_F with V = aligned - base, as published and as in SafeLoRA: no projector. The
    published code has s = 1 in the term, and adds it to every micro-batch, not once a step.
    """
    terms = []
    for name, (a, b) in lora.items():
        v = aligned[name].double() - base[name].double()
        off = torch.eye(len(v), dtype=torch.float64) - v @ v.T / v.norm()
        terms.append(((off @ (scale * b.double() @ a.double())) ** 2).sum())
    return reduced([terms], reduction)


def over_targets(
    term: Callable[[Tensor, Tensor, int, int], Tensor],
    policy: LogitsPerRow,
    reference: LogitsPerRow,
    micros: Sequence[Microbatch],
    samples: str = "all",
    reduction: str = "mean",
    restart: bool = False,
) -> Tensor:
    """Reduce term(log p (V,), log r (V,), target, place t = 1, 2, ...) over the labelled tokens.

    ``t`` counts the labelled tokens of a row; ``restart``: from 1 again after an unlabelled one.
    """
    rows = []
    for m, b in chosen_rows(micros, samples):
        row, t, previous = [], 0, None
        for s in labelled_positions(micros[m], b):
            t = 1 if restart and previous != s - 1 else t + 1
            log_p = torch.log_softmax(policy[m][b][s].double(), -1)
            log_r = torch.log_softmax(reference[m][b][s].double(), -1).detach()
            row.append(term(log_p, log_r, int(micros[m]["labels"][b, s + 1]), t))
            previous = s
        rows.append(row)
    return reduced(rows, reduction)


def published_beta(place: int) -> float:
    """beta_t of place t: 0.5 for the first token of the answer, 2 for t = 2..5, 0.1 after."""
    return 0.5 if place == 1 else 2.0 if place <= 5 else 0.1


def token_constraint(
    *batch: Any, beta: Any = published_beta, floor: float | None = None, **how: Any
) -> Tensor:
    """Reduce -(2 / beta(t)) log sigma(beta(t) (log p_t - log r_t)) ``over_targets(*batch, **how)``.

    p_t, r_t: the policy's and the reference's probability of the target at place t. With a floor:
    -sg(max(2 (1 - sigma(.)), floor)) log p_t, for floor 0 the same gradient and another value. The
    published code has floor 1e-3, the mean, and t over the whole row.
    """

    def term(log_p: Tensor, log_r: Tensor, target: int, t: int) -> Tensor:
        log_sigma = logsigmoid(beta(t) * (log_p[target] - log_r[target]))
        if floor is None:
            return -2 / beta(t) * log_sigma
        return -(2 * (1 - log_sigma.exp())).clamp_min(floor).detach() * log_p[target]

    return over_targets(term, *batch, **how)


def anchored_sft(*batch: Any, weight: float, stop: bool = True, **how: Any) -> Tensor:
    """ASFT: reduce sg(p_t) (-log p_t) + weight * KL(r, p) ``over_targets(*batch, **how)``.

    KL(r, p) = sum_v r (log r - log p) at the same position. No division by sum_t p_t. stop: sg is
    a stop-gradient, else nothing. Published: stop, and the mean of both over the labelled tokens.
    """

    def term(log_p: Tensor, log_r: Tensor, target: int, t: int) -> Tensor:
        p = log_p[target].detach().exp() if stop else log_p[target].exp()
        return -p * log_p[target] + weight * token_kl(log_p, log_r, "reference_to_policy", 1.0)

    return over_targets(term, *batch, **how)


def prefix_keys_values(
    double: nn.Module, residuals: Sequence[Tensor], length: int, stream: str
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (P, heads * width of a head) of each layer at the first ``length`` tokens.

    residuals: of one row, by index. stream 'raw': k_proj and v_proj of the residual itself, as the
    published code; 'normed': of its norm, as attention has them. Before RoPE, which as a rotation
    changes no distance. Call within ``adapters(double, on=...)`` and ``KeepFloat64()``.
    """
    raw, pairs = one_of(stream, "raw", "normed"), []
    for layer, hidden in zip(double.layers, residuals, strict=False):  # the last is no layer's
        seen = hidden[None, :length] if raw else layer.sa_norm(hidden[None, :length])
        pairs.append((layer.attn.k_proj(seen)[0], layer.attn.v_proj(seen)[0]))
    return pairs


def prefix_anchor(
    policy: Sequence[tuple[Tensor, Tensor]],
    reference: Sequence[tuple[Tensor, Tensor]],
    weight: float = 1.0,
    over_layers: str = "mean",
    threshold: float = 0.0,
    threshold_of: str = "weighted",
) -> Tensor:
    """TReFT: over layers (mean or sum), mean over prefix tokens of |k - k_ref|^2 / |k_ref|^2 + v's.

    A layer's (keys, values) are (P, heads * width) each, the norm over all heads, floored at
    1e-12. threshold_of 'weighted' is the published max(weight * term - threshold, 0), 'term' is
    weight * max(term - threshold, 0). All rows share the prefix: no mean over rows.
    """
    layers = []
    for both in zip(policy, reference, strict=True):
        parts = []
        for ours, theirs in zip(*both, strict=True):
            for x, y in zip(ours.double(), theirs.double().detach(), strict=True):
                parts.append((x - y).square().sum() / y.norm().clamp_min(1e-12) ** 2 / len(ours))
        layers.append(total(parts))
    term = reduced([layers], over_layers)
    if one_of(threshold_of, "weighted", "term"):
        return (weight * term - threshold).clamp_min(0)
    return weight * (term - threshold).clamp_min(0)


def ablate_with(subspaces: dict[int, Tensor], positions: Sequence[int] | None = None) -> Steer:
    """Return the callback h <- h - Q Q^T h at the residual indices that ``subspaces`` names.

    subspaces: (D, k) of rank k by index, Q its columns made orthonormal. positions: None is every
    token. The gradient goes through the projection. For the policy's training forward only.
    """
    for directions in subspaces.values():
        assert torch.linalg.matrix_rank(directions.double()) == directions.shape[1]
    bases = {index: torch.linalg.qr(q.double()).Q for index, q in subspaces.items()}

    def steer(i: int, hidden: Tensor) -> Tensor:
        if i not in bases:
            return hidden
        tokens = list(hidden[0])
        for s in range(len(tokens)) if positions is None else positions:
            tokens[s] = tokens[s] - bases[i] @ (bases[i].T @ tokens[s])
        return torch.stack(tokens)[None]

    return steer


def dot_latents(directions: Tensor) -> Latents:
    """z_j = h . u_j for the rows u_j of (n, D), as they are: divide by their norm before."""
    return lambda h: [h.double() @ u for u in directions.double()]


def direction_block(
    policy: ResidualsPerRow,
    reference: ResidualsPerRow,
    micros: Sequence[Microbatch],
    index: int,
    latents: Latents,
    sides: Sequence[str],
    over_latents: str = "sum",
    samples: str = "all",
    reduction: str = "mean",
) -> Tensor:
    """Reduce over response tokens the sum (or mean) over latents of the penalty of z against z_ref.

    sides, one a latent: 'up' (K+) is relu(z - z_ref)^2, 'down' (K-) relu(z_ref - z)^2, 'both'
    (z - z_ref)^2. Response tokens are the positions whose next token is labelled, as cross
    entropy's. index: residual index. latents: ``dot_latents``, or an SAE's encoder.
    """
    rows = []
    for m, b in chosen_rows(micros, samples):
        row = []
        for s in labelled_positions(micros[m], b):
            ours, theirs = latents(policy[m][b][index][s]), latents(reference[m][b][index][s])
            penalties = []
            for z, z_ref, side in zip(ours, theirs, sides, strict=True):
                rise = z - z_ref.detach()
                kept = {"up": rise.clamp_min(0), "down": rise.clamp_max(0), "both": rise}[side]
                penalties.append(kept**2)
            row.append(reduced([penalties], over_latents))
        rows.append(row)
    return reduced(rows, reduction)


def surgery(user: Gradients, aligned: Gradients, rho: float, group: str = "all") -> Gradients:
    """SafeGrad: g_u - (g_u . g_a / |g_a|^2) g_a where g_u . g_a < 0, else g_u; then + rho g_a.

    Dot product and norm are over 'all' parameters together, or over 'each' by itself. rho g_a is
    added with and without a conflict.
    """
    changed = {}
    for names in [list(user)] if one_of(group, "all", "each") else [[name] for name in user]:
        dot = sum(float((user[n].double() * aligned[n].double()).sum()) for n in names)
        square = sum(float((aligned[n].double() ** 2).sum()) for n in names)
        for n in names:
            conflict = dot / square * aligned[n].double() if dot < 0 else 0.0
            changed[n] = user[n].double() - conflict + rho * aligned[n].double()
    return changed


def inoculated(
    x: Tensor, w: Tensor, task: Sequence[Tensor], s: float, trait: Sequence[Tensor], s_ia: float
) -> Tensor:
    """y = W x + s_IA B_IA A_IA x + s B A x of x (in,), with task = (A, B), trait = (A_IA, B_IA).

    s_ia = 0 is what is deployed. W and the trait are frozen, yet x's gradient goes through them.
    The published scale is alpha / sqrt(rank) (rsLoRA), torchtune's alpha / rank. For a whole model
    add s_IA B_IA A_IA to the frozen weights of its ``to_float64`` copy.
    """
    x, w, a, b, a_ia, b_ia = (tensor.double() for tensor in (x, w, *task, *trait))
    return w.detach() @ x + s_ia * b_ia.detach() @ (a_ia.detach() @ x) + s * b @ (a @ x)


def adapter_ema(
    history: Sequence[Weights], decay: float, start: str = "first", debias: bool = False
) -> Weights:
    """e_t = decay e_(t-1) + (1 - decay) theta_t over the adapter's states, oldest first.

    start 'first': e is history[0] (the state before training, or after the first update), 'zero':
    e = 0 before it. debias: / (1 - decay^n). A and B are averaged, which does not average B A.
    """
    average = {name: theta.double() for name, theta in history[0].items()}
    if not one_of(start, "first", "zero"):
        average = {name: (1 - decay) * theta for name, theta in average.items()}
    for state in history[1:]:
        average = {n: decay * e + (1 - decay) * state[n].double() for n, e in average.items()}
    return {n: e / (1 - decay ** len(history)) if debias else e for n, e in average.items()}
