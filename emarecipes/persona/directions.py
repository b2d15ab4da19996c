"""The command behind `recipes/ema_directions.py`: where an adapter moves the residual stream.

Shapes: N rows, K = layers + 1 residual indices, R directions, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from emarecipes.command import run_alone
from emarecipes.errors import UserError
from emarecipes.models.adapters.read import set_adapter
from emarecipes.models.loss_head import LossHead
from emarecipes.models.sampling.draw import derived_seed
from emarecipes.models.source import load_model
from emarecipes.output_dir import held
from emarecipes.persona.directions_checked import CheckedDirections
from emarecipes.persona.directions_report import LayerShift, print_result, write_result
from emarecipes.persona.read import read_activations
from emarecipes.persona.vectors import random_vectors, top_directions


def run_directions(argv: Sequence[str]) -> int:
    """Find the directions as `--config FILE [key=value | ~key]...` says.

    Returns:
        The exit code: 0, or 1 after a `UserError`, which is printed as one line.
    """
    return run_alone("ema_directions", _find, argv)


def _find(argv: Sequence[str]) -> None:
    run = CheckedDirections(argv)
    with held(Path(run.cfg.output_dir), run.origin.at("output_dir")):
        find_directions(run)


def find_directions(run: CheckedDirections) -> None:
    r"""Read every answer with the adapter and without it, and write the directions of the change.

    With a_k(row) the mean over the answer's tokens of the residual stream after k layers, row n of
    X_k is a_k(n) with the adapter - a_k(n) without. Directions are the first right singular vectors
    of X_k over the rows that are not held out, not centred; `persona` is these rows' mean.

    Source: CAFT, arXiv 2507.16795, takes principal components of activation differences between a
    fine-tuned model and its base. There tokens are the samples, here answers, so that a long one
    counts as one.

    Raises:
        UserError: Activations are not finite, or do not change.
    """
    model = load_model(run.cfg)
    set_adapter(model, run.layers)
    head = LossHead(model)

    def read(label: str, *, reference: bool) -> tuple[Tensor, Tensor]:
        batch_size = run.cfg.batch_size
        found = read_activations(
            head, run.rows, batch_size=batch_size, label=label, reference=reference
        )
        return found.activation_NKD, found.square_NK

    tuned_NKD, _ = read("with the adapter", reference=False)
    base_NKD, square_NK = read("without it", reference=True)
    change_NKD = tuned_NKD - base_NKD
    if not change_NKD.isfinite().all():
        raise UserError("the model's activations are not finite; try dtype=fp32")
    if not change_NKD.any():
        raise UserError(
            f"{run.cfg.adapter} does not change the residual stream: it is on the output layer "
            f"alone, or too small for dtype {run.cfg.dtype}; try dtype=fp32"
        )
    used_N = ~run.held_out_N
    mean_KD = change_NKD[used_N].mean(dim=0)
    vectors = {
        "persona": mean_KD,
        "random": random_vectors(mean_KD, derived_seed(run.cfg.seed, "random vector")),
        "subspace": top_directions(change_NKD[used_N], run.cfg.num_directions),
    }
    layers = layer_shifts(change_NKD[run.held_out_N], square_NK, vectors["subspace"], mean_KD)
    write_result(run, vectors, layers)
    print_result(run, layers)


def layer_shifts(
    held_out_NKD: Tensor, square_NK: Tensor, subspace_KRD: Tensor, mean_KD: Tensor
) -> list[LayerShift]:
    """What each residual index's directions hold of the change of rows that they were not made of.

    Args:
        held_out_NKD: These rows' change.
        square_NK: Mean squared norm of the stream at each row's answer, without the adapter.
        subspace_KRD: Orthonormal, or 0.
        mean_KD: The other rows' mean change.
    """
    change_KN = held_out_NKD.double().square().sum(dim=2).T
    along_KN = torch.einsum("nkd,krd->knr", held_out_NKD.double(), subspace_KRD.double())
    held_K = along_KN.square().sum(dim=(1, 2)) / change_KN.sum(dim=1)
    rms_K = square_NK.double().mean(dim=0).sqrt()
    chance_K = subspace_KRD.any(dim=2).sum(dim=1).double() / subspace_KRD.shape[2]
    columns = zip(
        (change_KN.mean(dim=1).sqrt() / rms_K).tolist(),
        (mean_KD.double().norm(dim=1) / rms_K).tolist(),
        held_K.tolist(),
        chance_K.tolist(),
        strict=True,
    )
    return [LayerShift(layer, *figures) for layer, figures in enumerate(columns)]
