"""Projecting a LoRA update onto what alignment changed, without a (out x out) matrix.

Shapes: O rows and I columns of a weight, R rank of the adapter, K of a basis. The update is B A
with B (O, R) and A (R, I); V (O, I) is the aligned model's weight minus the base model's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from emarecipes.errors import UserError

Mode = Literal["project", "rescale", "soft"]
# The smaller side of a matrix up to which all its singular vectors are computed.
EXACT_SIDE = 2048


@dataclass(frozen=True)
class ProjectionOptions:
    """How updates are projected; see `emarecipes.defenses.SafeLoRA` for each.

    Raises:
        UserError: Options that contradict each other or are out of range.
    """

    threshold: float | None = None
    num_layers: int | None = None
    mode: Mode = "project"
    rank: int | None = None
    energy: float | None = None
    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.mode not in ("project", "rescale", "soft"):
            raise UserError(f"mode must be project, rescale or soft, not {self.mode}")
        chooses = self.threshold is not None or self.num_layers is not None
        if self.threshold is not None and self.num_layers is not None:
            raise UserError("give threshold or num_layers, not both")
        if self.mode == "soft" and chooses:
            raise UserError("mode soft acts on every layer: leave out threshold and num_layers")
        if self.mode != "soft" and not chooses:
            raise UserError("give threshold (of the cosine) or num_layers (published default 10)")
        if self.threshold is not None and not -1.0 <= self.threshold <= 1.0:
            raise UserError(f"threshold is of a cosine, from -1 to 1, not {self.threshold}")
        if self.num_layers is not None and self.num_layers < 1:
            raise UserError(f"num_layers must be >= 1, not {self.num_layers}")
        if self.rank is not None and self.energy is not None:
            raise UserError("give rank or energy, not both")
        if self.rank is not None and self.rank < 1:
            raise UserError(f"rank must be >= 1, not {self.rank}")
        if self.energy is not None and not 0.0 < self.energy < 1.0:
            raise UserError(f"energy must be between 0 and 1, not {self.energy}")
        if self.mode == "soft" and not self.orthogonal:
            raise UserError("mode soft needs a basis of the aligned subspace: give rank or energy")
        if not 0.0 <= self.strength < math.inf:
            raise UserError(f"strength must be a finite number >= 0, not {self.strength}")

    @property
    def orthogonal(self) -> bool:
        """Whether the projector is U U^T, and not the published V V^T / |V|."""
        return self.rank is not None or self.energy is not None

    def basis_numbers(self, rows: int, columns: int) -> int:
        """How many numbers the basis of a matrix holds; with `energy`, at most."""
        limit = min(rows, columns)
        return (rows + columns) * (limit if self.rank is None else min(self.rank, limit))


class Basis(NamedTuple):
    """Orthonormal bases of the dominant column space of V, (O, K), and row space, (I, K)."""

    left_OK: Tensor
    right_IK: Tensor


class ModuleProjection(NamedTuple):
    """What became of one adapted module.

    Attributes:
        name: The module.
        cosine: Between its update as projected and its own; NaN where V or the update is zero.
        changed: Whether it was changed.
        norm_before: Frobenius norm of B A.
        norm_after: The same of the new update.
        a_RI: The new A.
        b_OR: The new B.
    """

    name: str
    cosine: float
    changed: bool
    norm_before: float
    norm_after: float
    a_RI: Tensor
    b_OR: Tensor


def project_adapter(
    lora: Mapping[str, tuple[Tensor, Tensor]],
    aligned_minus_base: Callable[[str], Tensor],
    options: ProjectionOptions,
    *,
    device: torch.device | None = None,
    bases: dict[str, Basis] | None = None,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> list[ModuleProjection]:
    """Project every module's update, then keep the result where the options say so.

    Args:
        lora: Each module's A (R, I) and B (O, R); not changed.
        aligned_minus_base: Gives a module's V (O, I) in float32; the next may be written over it.
        options: What to do.
        device: Where to compute; by default where the tensors are.
        bases: Keeps the bases of V between calls, if given.
        progress: Wraps the loop over modules.

    Returns:
        One entry a module, in the order of `lora`, float32.
    """
    found = []
    for name in progress(list(lora)):
        a_RI, b_OR = (t.detach().to(device, torch.float32) for t in lora[name])
        basis = None if bases is None else bases.get(name)
        v_OI = None if basis is not None else aligned_minus_base(name).to(a_RI.device)
        if options.orthogonal and basis is None:
            assert v_OI is not None
            basis = dominant_basis(v_OI, options.rank, options.energy)
            if bases is not None:
                bases[name] = basis
        found.append(_project_module(name, a_RI, b_OR, v_OI, basis, options))
    changed = _chosen([module.cosine for module in found], options)
    return [
        module._replace(changed=True)
        if change
        else module._replace(
            changed=False,
            norm_after=module.norm_before,
            a_RI=lora[module.name][0].float(),
            b_OR=lora[module.name][1].float(),
        )
        for module, change in zip(found, changed, strict=True)
    ]


def _project_module(
    name: str,
    a_RI: Tensor,
    b_OR: Tensor,
    v_OI: Tensor | None,
    basis: Basis | None,
    options: ProjectionOptions,
) -> ModuleProjection:
    new_a, new_b = a_RI, b_OR
    if basis is not None and basis.left_OK.shape[1] == 0:  # V is zero: nothing to project onto.
        before = math.sqrt(max(0.0, _products(a_RI, b_OR, a_RI, b_OR)[0]))
        return ModuleProjection(name, math.nan, False, before, before, a_RI, b_OR)
    if basis is None:
        assert v_OI is not None
        # C B = V (V^T B) / |V|: 4 O I R operations, where C itself takes 2 O^2 I.
        flat = v_OI.reshape(-1)
        new_b = v_OI @ (b_OR.T @ v_OI).T / flat.dot(flat).sqrt()
    elif options.mode == "soft":
        keep = 1.0 / (1.0 + options.strength)
        new_b = _shrink_outside(b_OR, basis.left_OK, keep)
        new_a = _shrink_outside(a_RI.T, basis.right_IK, keep).T
    else:
        new_b = basis.left_OK @ (basis.left_OK.T @ b_OR)
    before, after, product = _products(a_RI, b_OR, new_a, new_b)
    before, after = math.sqrt(max(0.0, before)), math.sqrt(max(0.0, after))
    cosine = product / (before * after) if before > 0 and after > 0 else math.nan
    if options.mode == "rescale" and before > 0:
        new_b = b_OR * (after / before)
    return ModuleProjection(name, cosine, True, before, after, new_a, new_b)


def dominant_basis(v_OI: Tensor, rank: int | None, energy: float | None) -> Basis:
    """The first K left and right singular vectors of V.

    K is `rank`, or the smallest number whose squared singular values sum to `energy` of all, and no
    more than V has singular values above rounding: of a V of zeros the bases have no column.

    Up to `EXACT_SIDE` rows or columns they come from the eigenvectors of V V^T or V^T V in float64.
    Beyond, by randomised SVD (Halko et al., 2011) with 16 power iterations, exact where K comes
    near the smaller side of V; where singular values fall off slowly the last vectors are mixed
    with those that follow.
    """
    limit = min(v_OI.shape)
    wanted = rank if rank is not None else 16
    while True:
        wanted = min(wanted, limit)
        left, values, right = _singular_vectors(v_OI, wanted)
        held = values.square().cumsum(0) / max(float(v_OI.double().square().sum()), 1e-300)
        there = int((values > values[0] * max(v_OI.shape) * 1.2e-7).sum())  # float32's epsilon.
        if rank is not None:
            return _first_columns(left, right, min(wanted, there))
        assert energy is not None
        # At full width rounding alone may keep the sum below the share.
        enough = (held >= energy).nonzero()
        if len(enough) or len(values) == limit:
            size = int(enough[0]) + 1 if len(enough) else limit
            return _first_columns(left, right, min(size, there))
        wanted *= 2


def _singular_vectors(v_OI: Tensor, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
    """Left vectors, values (float64) and right vectors, the largest first: `wanted` or more."""
    if min(v_OI.shape) > EXACT_SIDE:
        # Of its own, so that the run's random numbers stay as they are.
        with torch.random.fork_rng(devices=[v_OI.device] if v_OI.is_cuda else []):
            torch.manual_seed(0)
            count = min(*v_OI.shape, wanted + 10)
            left, values, right = torch.svd_lowrank(v_OI, q=count, niter=16)
        return left, values.double(), right
    tall = v_OI.shape[0] > v_OI.shape[1]
    wide = (v_OI.T if tall else v_OI).double()
    squares, vectors = torch.linalg.eigh(wide @ wide.T)
    values, left = squares.clamp(min=0).sqrt().flip(0), vectors.flip(1)
    right = wide.T @ left / values.clamp(min=1e-300)
    parts = (right, left) if tall else (left, right)
    return parts[0].to(v_OI.dtype), values, parts[1].to(v_OI.dtype)


def _first_columns(left: Tensor, right: Tensor, size: int) -> Basis:
    # Copied, for a view would keep all columns in memory.
    return Basis(left[:, :size].clone(), right[:, :size].clone())


def _chosen(cosines: list[float], options: ProjectionOptions) -> list[bool]:
    """Which modules are changed; where V or the update is zero there is nothing to change.

    Cosines are rounded to five digits as the published code does, so that ties are the same.
    """
    cosines = [round(cosine, 5) for cosine in cosines]
    known = sorted(cosine for cosine in cosines if not math.isnan(cosine))
    if options.mode == "soft":
        limit = math.inf
    elif options.threshold is not None:
        limit = options.threshold
    else:
        assert options.num_layers is not None
        limit = known[min(options.num_layers, len(known)) - 1] if known else -math.inf
    return [cosine <= limit for cosine in cosines]


def _shrink_outside(rows: Tensor, basis: Tensor, keep: float) -> Tensor:
    """(P + keep (1 - P)) rows, with P the projector on the basis."""
    return keep * rows + (1.0 - keep) * (basis @ (basis.T @ rows))


def _products(a: Tensor, b: Tensor, new_a: Tensor, new_b: Tensor) -> tuple[float, float, float]:
    """|B A|^2, |B' A'|^2 and <B A, B' A'>, each as <B (A A'^T), B'>, without the updates."""
    same = new_a is a
    weighted = b @ (a @ a.T)
    crossed = weighted if same else b @ (a @ new_a.T)
    new_weighted = new_b @ (new_a @ new_a.T)
    pairs = ((weighted, b), (new_weighted, new_b), (crossed, new_b))
    before, after, product = (float(x.reshape(-1).dot(y.reshape(-1))) for x, y in pairs)
    return before, after, product
