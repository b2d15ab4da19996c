"""AsFT: what an update does outside of the alignment direction costs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torchtune import utils
from tqdm import tqdm

from emarecipes.defenses.aligned_pair import AlignedPair
from emarecipes.defenses.base import Defense
from emarecipes.defenses.context import AdaptedModule, TrainingContext
from emarecipes.errors import UserError
from emarecipes.models.source import ModelSource

log = utils.get_logger("INFO")


class AsFT(Defense):
    r"""Squared Frobenius norm of the update's part off the alignment direction, summed over layers.

    For an adapted weight with update s B A (s = lora_alpha / lora_rank) let V = W_aligned - W_base:

        term = sum over layers of  |(1 - C) s B A|_F^2,    C = V V^T / |V|_F

    C is SafeLoRA's, and no projector: its eigenvalues are V's squared singular values over |V|_F.
    Neither C nor B A is formed: with B' = B - V (V^T B) / |V|_F,

        |(1 - C) B A|_F^2 = tr((B'^T B') (A A^T))

    takes four products of V with r columns a layer and step, its gradient's included. A layer
    whose V is 0 is left out.

    Every process holds V of all adapted layers, in the run's dtype, and computes all of them.

    Source: "AsFT: Anchoring Safety During LLM Fine-Tuning Within Narrow Safety Basin",
    arXiv 2506.08473 (there a sum over layers too). For emergent misalignment no figure is known.
    Not to be mixed up with ASFT, arXiv 2509.23753: that is `AnchoredSFT`.

    Args:
        base_dir: The unaligned model's folder (for Llama-3-8B-Instruct: Llama-3-8B).
        aligned_dir: The aligned model's folder, as a rule the one that is fine-tuned.
        weight: Factor of the sum in the loss.
        hold: Where V is held between steps: the training "device", or "cpu" (moved at every step).
        every_n_batches: k: in one step of every k, see `KLToReference`.

    Raises:
        UserError: For a negative weight or an unknown option; in `check` folders that do not fit
            the model, are the same, hold the same weights, or are swapped; DoRA.
    """

    module_reduction = "sum"

    def __init__(
        self,
        base_dir: str,
        aligned_dir: str,
        weight: float = 1.0,
        hold: Literal["device", "cpu"] = "device",
        every_n_batches: int = 1,
    ) -> None:
        super().__init__(weight, every_n_batches=every_n_batches)
        if hold not in ("device", "cpu"):
            raise UserError(f"hold must be device or cpu, not {hold}")
        self._pair = AlignedPair(base_dir, aligned_dir)
        self._hold = hold

    def check(self, source: ModelSource) -> None:
        """Open the folders and check them against the model.

        Raises:
            UserError: See `AlignedPair.check`.
        """
        self._modules = self._pair.check(source, "AsFT", "measures")

    def setup(self, model: Any, context: TrainingContext) -> None:
        """Read V of every adapted layer."""
        changed = self._pair.difference()
        device = context.device if self._hold == "device" else torch.device("cpu")
        self._v: dict[str, tuple[Tensor, float]] = {}
        for name, module in tqdm(
            self._modules.items(),
            desc="AsFT",
            unit="layer",
            disable=not context.first_process,
            leave=False,
        ):
            v_OI = module.take(changed(module.hf_name))
            # Cloned: the difference's memory is that of the next one.
            self._v[name] = v_OI.to(device, context.dtype, copy=True), float(v_OI.norm())
        left_out = [name for name, (_, norm) in self._v.items() if not norm]
        if left_out and context.first_process:
            log.info(f"AsFT leaves out {len(left_out)} layers, the same in both folders")

    def weight_term(self, module: AdaptedModule) -> Tensor | None:
        """|(1 - C) s B A|_F^2 of one layer; None where V is 0."""
        v_OI, norm = self._v[module.name]
        if not norm:
            return None
        v_OI = v_OI.to(module.b_OR.device, torch.float32)
        off_OR = module.b_OR - v_OI @ (v_OI.T @ module.b_OR) / norm
        gram_RR = module.a_RI @ module.a_RI.T
        return module.scale**2 * ((off_OR.T @ off_OR) * gram_RR).sum()

    def kept_bytes(self, shapes: Iterable[tuple[int, int]], itemsize: int) -> int:
        """What V of matrices of these shapes takes on the device of each process."""
        if self._hold == "cpu":
            return 0
        return itemsize * sum(rows * columns for rows, columns in shapes)
