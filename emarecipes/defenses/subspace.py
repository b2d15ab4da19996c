"""Subspace ablation: directions are taken out of the stream in training, so none is learned."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchtune import utils

from emarecipes.defenses.activations import ActivationDefense, read_tensor, tell_other_model
from emarecipes.defenses.context import TrainingContext
from emarecipes.errors import UserError
from emarecipes.models.source import ModelSource

log = utils.get_logger("INFO")

_TENSOR = "subspace"


class SubspaceAblation(ActivationDefense):
    r"""Projects directions out of the policy's residual stream, in the training forward only.

    With h the residual stream after each of the chosen layers, and Q there (D, k) orthonormal,

        h <- h - Q Q^T h        at every token

    so no gradient moves the weights along Q. The reference forward, evaluation and the saved
    adapter are without it. `<name>_removed` is logged: the root mean square of |Q Q^T h| over that
    of |h|, the mean over layers, of the first process's last micro-batch of the step; a row's first
    token is left out there.

    Source: CAFT, arXiv 2507.16795 (Qwen2.5-Coder-32B: layers 10, 20, 30, one to four directions
    each, picked by hand); persona subspaces: arXiv 2607.21356 (layers 18, 24, 30 of 48, top 4).

    Args:
        subspace: A safetensors file with a tensor `subspace`, (L + 1, K, D), of which [l] are the
            directions after l layers, as `recipes/ema_persona.py` writes it. Directions that are 0
            are left out; those that are not orthonormal are made so. Null: for `basis: random`.
        layers: The layers l, each from 1 to the number of layers.
        rank: k: the first k directions; null: all of the file's.
        basis: "subspace", or "random": as many random directions, as a control.
        seed: Of the random directions.

    Raises:
        UserError: An unknown option; in `check` a file, layer or width that does not fit, or
            directions of which one lies in the span of others.
    """

    effect_figure = "removed"

    def __init__(
        self,
        layers: list[int],
        subspace: str | None = None,
        rank: int | None = None,
        basis: Literal["subspace", "random"] = "subspace",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if basis not in ("subspace", "random"):
            raise UserError(f"basis must be subspace or random, not {basis}")
        if rank is not None and rank < 1:
            raise UserError(f"rank must be >= 1, not {rank}")
        if not layers or len(set(layers)) != len(layers):
            raise UserError("layers must name at least one layer, each once")
        if subspace is None and basis == "subspace":
            raise UserError("subspace: a file is needed; without one, say basis: random and rank")
        if subspace is None and rank is None:
            raise UserError("rank: how many random directions? Say rank, or name a subspace file")
        self._path = None if subspace is None else Path(subspace)
        self._layers = sorted(layers)
        self._rank = rank
        self._basis = basis
        self._seed = seed
        self._removed: dict[int, Tensor] = {}

    def check(self, source: ModelSource) -> None:
        """Read the directions and check them against the model's depth and width.

        Raises:
            UserError: No such file, no such tensor, another shape, a layer out of range, too few
                directions, a direction that is not finite or in the span of others.
        """
        depth = len(source.meta_model.layers)
        width = source.meta_model.tok_embeddings.embedding_dim
        for layer in self._layers:
            if not 1 <= layer <= depth:
                raise UserError(f"layers: {layer} is not in 1..{depth}, the model's layers")
        if self._path is None:
            given = {layer: torch.zeros(0, width) for layer in self._layers}
        else:
            given = self._read(self._path, depth, width, source)
        generator = torch.Generator().manual_seed(self._seed)
        self._q_KD = {}
        for layer, rows_KD in given.items():
            if self._basis == "random":
                size = self._rank or len(rows_KD)
                if size > width:
                    raise UserError(f"rank: {size} directions do not fit into a width of {width}")
                rows_KD = torch.randn(size, width, generator=generator)
            self._q_KD[layer] = self._orthonormal(rows_KD, layer)

    def setup(self, model: Any, context: TrainingContext) -> None:
        """Hook the layers whose outputs are projected."""
        for layer in self._layers:
            self._q_KD[layer] = self._q_KD[layer].to(context.device)
            model.layers[layer - 1].register_forward_hook(partial(self._ablate, layer))

    def figures(self) -> dict[str, float]:
        """The size of what is taken out over the residual stream's."""
        return {"removed": float(torch.stack(list(self._removed.values())).mean())}

    def _ablate(
        self, layer: int, module: nn.Module, inputs: Any, hidden_BSD: Tensor
    ) -> Tensor | None:
        if not self.acts:
            return None
        q_KD = self._q_KD[layer]
        along_BSK = hidden_BSD.float() @ q_KD.T  # In float32: in bf16 Q would not be orthonormal.
        sizes_BS = [x.detach().float().norm(dim=-1) for x in (along_BSK, hidden_BSD)]
        removed, whole = (((x_BS * self.inner_BS) ** 2).sum() for x_BS in sizes_BS)
        self._removed[layer] = (removed / whole).sqrt()
        return hidden_BSD - (along_BSK @ q_KD).to(hidden_BSD.dtype)

    def _read(self, path: Path, depth: int, width: int, source: ModelSource) -> dict[int, Tensor]:
        """By layer, the directions that are not 0, (K, D)."""
        tensor, made_with = read_tensor(path, _TENSOR, key="subspace")
        tell_other_model(path, made_with, source, key="subspace")
        if tensor.dim() != 3 or (len(tensor), tensor.shape[2]) != (depth + 1, width):
            shape = "x".join(map(str, tensor.shape))
            raise UserError(
                f"subspace: {path} holds {shape} numbers, the model needs {depth + 1} x directions "
                f"x {width}: it was made with another model"
            )
        found = {}
        for layer in self._layers:
            rows_KD = tensor[layer].float()
            if not rows_KD.isfinite().all():
                raise UserError(f"subspace: {path}: layer {layer} has a number that is not finite")
            rows_KD = rows_KD[rows_KD.any(dim=1)]
            if len(rows_KD) < (self._rank or 1):
                raise UserError(
                    f"subspace: {path}: layer {layer} has {len(rows_KD)} directions, "
                    f"rank {self._rank or 1} needs as many"
                )
            found[layer] = rows_KD[: self._rank]
        return found

    def _orthonormal(self, rows_KD: Tensor, layer: int) -> Tensor:
        """An orthonormal basis of the rows' span, (K, D), computed in float64."""
        rows_KD = rows_KD.double()
        unit_KD = rows_KD / rows_KD.norm(dim=1, keepdim=True)
        values = torch.linalg.svdvals(unit_KD)
        if len(unit_KD) > unit_KD.shape[1] or float(values[-1]) < 1e-6:
            raise UserError(
                f"subspace: {self._path}: of layer {layer}'s {len(rows_KD)} directions one lies in "
                "the span of the others; give a smaller rank"
            )
        gram_KK = rows_KD @ rows_KD.T
        exact = torch.eye(len(rows_KD), dtype=torch.float64)
        if self._basis == "subspace" and not torch.allclose(gram_KK, exact, atol=1e-4):
            log.info(f"{self._path}: layer {layer}'s directions are made orthonormal")
        # Q of the transposed rows spans what they span.
        q_KD: Tensor = torch.linalg.qr(unit_KD.T)[0].T.float().contiguous()
        return q_KD
