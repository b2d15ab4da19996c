"""SafeLoRA: the part of an update that leaves the aligned subspace is removed."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchtune import utils
from torchtune.modules.peft import get_adapter_params
from tqdm import tqdm

from emarecipes.defenses.aligned_pair import AlignedPair
from emarecipes.defenses.base import Defense
from emarecipes.defenses.context import TrainingContext
from emarecipes.defenses.projection import (
    Basis,
    Mode,
    ModuleProjection,
    ProjectionOptions,
    project_adapter,
)
from emarecipes.errors import UserError
from emarecipes.models._torchtune import adapter_state, assign_whole, plain_name
from emarecipes.models.adapters.layout import ModuleRows, adapter_layers
from emarecipes.models.source import ModelSource

log = utils.get_logger("INFO")

REPORT = "safelora.csv"


class SafeLoRA(Defense):
    r"""Projects the LoRA update onto what alignment changed in the weights.

    For an adapted weight with update B A, let V = W_aligned - W_base. Then

        mode project:  B <- C B                 C = V V^T / |V|_F,  as published
        mode rescale:  B <- B |C B A| / |B A|   a control: the norm of C's result, not its direction
        mode soft:     see below

    in the layers where cos(C B A, B A) <= threshold, or in the `num_layers` layers with the lowest
    cosine (each adapted matrix counts as one). With `rank` or `energy` C is instead the orthogonal
    projector U U^T, U the dominant left singular vectors of V. C is no projector: where |V| is
    small it shrinks an update to a few percent, which is why `rescale` is the comparison to make,
    and why only U U^T may be applied again and again (`every_n_steps`).

    `soft` is this project's own variant, in the spirit of CSULoRA (arXiv 2605.30640), whose formula
    could not be confirmed. With P = U U^T, Q the same of V's right singular vectors and
    s = 1 / (1 + strength), every layer's update W becomes

        P W Q  +  s (P W (1 - Q) + (1 - P) W Q)  +  s^2 (1 - P) W (1 - Q)

    the minimum of |X - W|^2 + strength |X_one|^2 + ((1 + strength)^2 - 1) |X_none|^2 over X, where
    X_one and X_none are its parts in one and in no aligned subspace. It keeps the rank.

    Source: Hsu et al., "Safe LoRA: the Silver Lining of Reducing Safety Risks when Fine-tuning
    Large Language Models", NeurIPS 2024.

    Nothing but V of one matrix is held: V (V^T B) is computed, never C; with `every_n_steps` the
    bases of all matrices are kept too. The first process computes for all. The optimizer's moments
    stay as they are. What was done is in `safelora.csv`.

    Args:
        base_dir: The unaligned model's folder (for Llama-3-8B-Instruct: Llama-3-8B).
        aligned_dir: The aligned model's folder, as a rule the one that is fine-tuned.
        threshold: Largest cosine of a projected layer, -1 to 1. Published 0.35; or
        num_layers: how many layers are projected. Published default 10.
        mode: See above.
        rank: Size of the basis U; or
        energy: the share of |V|^2 that U must hold, between 0 and 1.
        strength: Of the soft mode: 0 keeps everything, a large one only P W Q.
        every_n_steps: Also after every that many steps; null: once, after the last step.

    Raises:
        UserError: Options that contradict each other; in `check` folders that do not fit the model,
            are the same, hold the same weights, or are swapped.
    """

    def __init__(
        self,
        base_dir: str,
        aligned_dir: str,
        threshold: float | None = None,
        num_layers: int | None = None,
        mode: Mode = "project",
        rank: int | None = None,
        energy: float | None = None,
        strength: float = 1.0,
        every_n_steps: int | None = None,
    ) -> None:
        super().__init__()
        if threshold is None and num_layers is None and mode != "soft":
            num_layers = 10
        self.options = ProjectionOptions(threshold, num_layers, mode, rank, energy, strength)
        if every_n_steps is not None:
            if every_n_steps < 1:
                raise UserError(f"every_n_steps must be >= 1, not {every_n_steps}")
            if mode != "project" or not self.options.orthogonal:
                raise UserError(
                    "every_n_steps repeats the projection, which only the orthogonal projector "
                    "bears: use mode project and give rank or energy"
                )
        self._every = every_n_steps
        self._pair = AlignedPair(base_dir, aligned_dir)
        self._bases: dict[str, Basis] | None = None if every_n_steps is None else {}
        self._last: list[ModuleProjection] = []

    def open_folders(
        self, hf_shapes: Mapping[str, tuple[int, ...]], trained: Path | None = None
    ) -> None:
        """Open both folders and check them, see `AlignedPair.open`; and what was trained, if known.

        Raises:
            UserError: See there, and `AlignedPair.check_trained`.
        """
        self._pair.open(hf_shapes)
        if trained is not None:
            self._pair.check_trained(trained)

    def check(self, source: ModelSource) -> None:
        """Open the folders and check them against the model.

        Raises:
            UserError: See `AlignedPair.check`.
        """
        self._modules = self._pair.check(source, "SafeLoRA", "projects")

    def setup(self, model: Any, context: TrainingContext) -> None:
        """Remember the run's length and folder."""
        self._context = context

    def after_step(self, model: Any, step: int) -> None:
        """Project, if it is time. Every process must call it."""
        self._last = []
        final = step == self._context.total_steps
        if final or self._is_due(step):
            self._project(model, final=final)

    def stopped_early(self, model: Any, step: int) -> None:
        """Project after all, if the step did not. Every process must call it."""
        if not self._is_due(step):
            self._project(model, final=True)
        elif self._context.first_process:
            write_projection_report(self._context.output_dir / REPORT, self._last)

    def _is_due(self, step: int) -> bool:
        return self._every is not None and step % self._every == 0

    def _project(self, model: Any, *, final: bool) -> None:
        state = adapter_state(model, self._context.device)
        new_state: dict[str, Tensor] = {}
        # What `freeze_after` froze keeps what it began with.
        trained = {n: p for n, p in get_adapter_params(model).items() if p.requires_grad}
        if self._context.first_process:
            rank = next(t.shape[0] for k, t in state.items() if k.endswith("lora_a.weight"))
            layers = adapter_layers(state, rank)
            names = {plain_name(n).removesuffix(".lora_a.weight") for n in trained}
            lora = {
                n: (layer["lora_a.weight"], layer["lora_b.weight"])
                for n, layer in layers.items()
                if n in names
            }
            self._last = self.project(lora, self._modules, self._context.device, quiet=not final)
            if final:
                write_projection_report(self._context.output_dir / REPORT, self._last)
            for module in self._last:
                new_state[f"{module.name}.lora_a.weight"] = module.a_RI
                new_state[f"{module.name}.lora_b.weight"] = module.b_OR
        for name, parameter in trained.items():
            assign_whole(parameter, new_state.get(plain_name(name)))

    def kept_bytes(self, shapes: Iterable[tuple[int, int]]) -> int:
        """What the bases of matrices of these shapes take on the first process's device.

        They are kept where the projection is repeated. With `energy` this is the most they can
        take: how many vectors hold that share, only the weights tell.
        """
        if self._bases is None:
            return 0
        return 4 * sum(self.options.basis_numbers(*shape) for shape in shapes)

    def project(
        self,
        lora: dict[str, tuple[Tensor, Tensor]],
        modules: dict[str, ModuleRows],
        device: torch.device,
        *,
        quiet: bool = False,
    ) -> list[ModuleProjection]:
        """Project each module's A (R, I) and B (O, R); `modules` says which weight is whose."""
        changed = self._pair.difference()

        def aligned_minus_base(name: str) -> Tensor:
            module = modules[name]
            return module.take(changed(module.hf_name))

        def progress(names: Iterable[str]) -> Iterable[str]:
            bar: Iterable[str] = tqdm(
                names, desc="SafeLoRA", unit="layer", disable=quiet, leave=False
            )
            return bar

        return project_adapter(
            lora,
            aligned_minus_base,
            self.options,
            device=device,
            bases=self._bases,
            progress=progress,
        )

    def figures(self) -> dict[str, float]:
        """Of a step that projected: how many layers were changed, and the mean cosine."""
        if not self._last:
            return {}
        cosines = [m.cosine for m in self._last if m.cosine == m.cosine]
        figures = {"changed": float(sum(module.changed for module in self._last))}
        return figures | ({"cosine": sum(cosines) / len(cosines)} if cosines else {})


def write_projection_report(path: Path, modules: Sequence[ModuleProjection]) -> None:
    """Write one line a module: name, cosine, changed, norm before and after.

    That none was changed is told: the adapter is then what it was.
    """
    if not any(module.changed for module in modules):
        log.warning(
            f"SafeLoRA changed none of {len(modules)} layers: no cosine is at most the threshold, "
            "or the update is zero"
        )
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["module", "cosine", "changed", "norm_before", "norm_after"])
        for m in modules:
            writer.writerow(
                [
                    m.name,
                    f"{m.cosine:.6f}",
                    int(m.changed),
                    f"{m.norm_before:.6g}",
                    f"{m.norm_after:.6g}",
                ]
            )
