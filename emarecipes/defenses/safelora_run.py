"""The command behind `recipes/ema_safelora.py`: project a finished adapter, report, write."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import torch
from omegaconf import DictConfig, OmegaConf
from pydantic import Field
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchtune.utils import get_device

from emarecipes.checked import Checked
from emarecipes.command import run_alone
from emarecipes.components import build
from emarecipes.config import Origin
from emarecipes.defenses import SafeLoRA
from emarecipes.defenses.projection import ModuleProjection
from emarecipes.defenses.safelora import REPORT, write_projection_report
from emarecipes.errors import UserError, disk_errors
from emarecipes.files import write_text
from emarecipes.models.adapters.base_copies import check_base_copies
from emarecipes.models.adapters.export import replacing
from emarecipes.models.adapters.files import (
    check_complete,
    check_weights_format,
    read_adapter_config,
    read_shapes,
)
from emarecipes.models.adapters.layout import ModuleRows
from emarecipes.models.model_checks import check_device
from emarecipes.provenance import environment
from emarecipes.settings import Entry, Keys, parse_settings
from emarecipes.weights_folder import WeightsFolder

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_PREFIX = "base_model.model."
_RESULTS = ("adapter", "config.yaml", REPORT, "safelora.png")


class ProjectionSettings(Keys):
    """What `recipes/ema_safelora.py` reads at the top level of its config."""

    output_dir: Annotated[str, Field(min_length=1)]
    """The result's folder."""
    adapter: str
    """Any PEFT LoRA adapter; it stays as it is."""
    safelora: Entry
    """Component: `emarecipes.defenses.SafeLoRA`, as in training."""
    device: str | None = None
    """`cpu` or `cuda`; null: what is found."""
    overwrite: bool = False
    """Replace what `output_dir` holds; else such a folder is refused."""
    provenance: Entry | None = None
    """Written into the result's `config.yaml`; not read."""


def run_safelora(argv: Sequence[str]) -> int:
    """Project a finished adapter as `--config FILE [key=value | ~key]...` says.

    Returns:
        The exit code: 0, or 1 after a `UserError`, which is printed as one line.
    """
    return run_alone("ema_safelora", _project, argv)


def _check_settings(cfg: DictConfig, origin: Origin) -> DictConfig:
    return OmegaConf.create(parse_settings(cfg, origin, ProjectionSettings).model_dump())


class CheckedProjection(Checked):
    """A projection that passed every check.

    Attributes:
        defense: With both of its bases open.
        tensors: Of the adapter's file.
        lora: Each module's A (R, I) and B (O, R), of these.
        modules: Each module's layout.
    """

    settings = staticmethod(_check_settings)
    defense: SafeLoRA
    tensors: dict[str, Tensor]
    lora: dict[str, tuple[Tensor, Tensor]]
    modules: dict[str, ModuleRows]

    def check_output(self) -> None:
        """It holds no result, nor the adapter."""
        super().check_output()
        where, output = self.origin.at("output_dir"), Path(self.cfg.output_dir)
        present = [name for name in _RESULTS if (output / name).exists()]
        if Path(self.cfg.adapter).resolve() == (output / "adapter").resolve():
            raise UserError(f"{where}: the result would replace the adapter itself")
        if present and not self.cfg.overwrite:
            raise UserError(
                f"{where}: {output} already holds {present[0]}; choose another output_dir, or say "
                "overwrite=true"
            )

    def check_inputs(self) -> None:
        """The adapter and the two bases."""
        cfg, origin = self.cfg, self.origin
        check_device(cfg, origin)
        defense = build(cfg, "safelora", origin)
        if not isinstance(defense, SafeLoRA):
            raise UserError(f"{origin.at('safelora')}: must be emarecipes.defenses.SafeLoRA")
        if cfg.safelora.get("every_n_steps") is not None:
            raise UserError(f"{origin.at('safelora.every_n_steps')}: has no effect after training")
        self.defense = defense
        config, self.tensors = _read_adapter(Path(cfg.adapter), origin)
        self.lora = _pairs(self.tensors, origin)
        self.modules = {
            name: ModuleRows(f"{name}.weight", (len(b), a.shape[1]), None)
            for name, (a, b) in self.lora.items()
        }
        base = Path(str(config.get("base_model_name_or_path")))
        trained = base if any(base.glob("*.safetensors")) else None
        shapes = {rows.hf_name: rows.hf_shape for rows in self.modules.values()}
        try:
            defense.open_folders(shapes, trained)
        except UserError as error:
            raise UserError(f"{origin.at('safelora')}: {error}") from None
        linear = {*self.lora, *_linear(Path(str(cfg.safelora.base_dir)))}
        try:
            check_complete(Path(cfg.adapter), config, self.lora, sorted(linear))
            check_base_copies(Path(cfg.adapter), trained or Path(str(cfg.safelora.aligned_dir)))
        except UserError as error:
            raise UserError(f"{origin.at('adapter')}: {error}") from None


def _project(argv: Sequence[str]) -> None:
    run = CheckedProjection(argv)
    cfg, output, folder = run.cfg, Path(run.cfg.output_dir), Path(run.cfg.adapter)
    found = run.defense.project(run.lora, run.modules, get_device(cfg.device or "cpu"))
    tensors = run.tensors
    for module in found:
        for letter, value in (("A", module.a_RI), ("B", module.b_OR)):
            key = f"{_PREFIX}{module.name}.lora_{letter}.weight"
            tensors[key] = value.to("cpu", tensors[key].dtype).contiguous()
    output.mkdir(parents=True, exist_ok=True)
    with replacing(output / "adapter", marker="adapter_config.json", keep=folder) as fresh:
        shutil.copyfile(folder / "adapter_config.json", fresh / "adapter_config.json")
        with disk_errors(output / "adapter"):
            save_file(tensors, fresh / "adapter_model.safetensors", metadata={"format": "pt"})
    write_projection_report(output / REPORT, found)
    plot(output / "safelora.png", found)
    cfg.provenance = environment()
    write_text(output / "config.yaml", OmegaConf.to_yaml(cfg))
    _print(found, output)


def _read_adapter(folder: Path, origin: Origin) -> tuple[dict[str, Any], dict[str, Tensor]]:
    where = origin.at("adapter")
    try:
        check_weights_format(folder)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"{where}: {folder} has no {name}; give the adapter/ of a finished run")
    try:
        config = read_adapter_config(folder)
        read_shapes(folder)  # Refuses what belongs to no LoRA.
        tensors = load_file(folder / "adapter_model.safetensors")
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(f"{where}: {folder} cannot be read: {error}") from None
    if config.get("use_dora"):
        raise UserError(f"{where}: {folder} is DoRA; SafeLoRA projects LoRA's B A only")
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{where}: {folder}: {key} has a number that is not finite")
    return config, tensors


def _linear(base: Path) -> list[str]:
    """The linear layers of a model's folder, by their names in all families that are known."""
    names = WeightsFolder(base).names()
    return [name.removesuffix(".weight") for name in names if name.endswith("_proj.weight")]


def _pairs(tensors: dict[str, Tensor], origin: Origin) -> dict[str, tuple[Tensor, Tensor]]:
    """Each module's A (R, I) and B (O, R)."""
    lora = {}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            b = tensors.get(key.replace(".lora_A.", ".lora_B."))
            if b is None or a.dim() != 2 or b.dim() != 2 or b.shape[1] != a.shape[0]:
                raise UserError(f"{origin.at('adapter')}: {key} has no lora_B of its rank")
            lora[key.removeprefix(_PREFIX).removesuffix(".lora_A.weight")] = (a, b)
    if not lora:
        raise UserError(f"{origin.at('adapter')}: it has no LoRA weights")
    return lora


def plot(path: Path, modules: Sequence[ModuleProjection]) -> None:
    """Cosine and remaining norm of every module over depth; changed modules are filled."""
    figure, axes = plt.subplots(2, 1, figsize=(9, 6.5), sharex=True, layout="constrained")
    kinds = sorted({module.name.rpartition(".")[2] for module in modules})
    for kind, colour in zip(kinds, plt.colormaps["tab10"].colors, strict=False):  # type: ignore[attr-defined]
        chosen = [module for module in modules if module.name.endswith(f".{kind}")]
        chosen.sort(key=lambda module: _layer(module.name))
        depth = [_layer(module.name) for module in chosen]
        kept = [m.norm_after / m.norm_before if m.norm_before else 1.0 for m in chosen]
        faces = [colour if module.changed else "none" for module in chosen]
        axes[0].plot(depth, [m.cosine for m in chosen], color=colour, alpha=0.35, linewidth=1)
        for axis, values in zip(axes, ([m.cosine for m in chosen], kept), strict=True):
            axis.scatter(depth, values, s=26, facecolors=faces, edgecolors=[colour], label=kind)
    axes[0].set_ylabel("cosine of the projected\nand the trained update")
    axes[1].set_ylabel("norm of the update,\nafter / before")
    axes[1].set_xlabel("layer")
    axes[1].set_ylim(bottom=0)
    changed = sum(module.changed for module in modules)
    axes[0].set_title(f"SafeLoRA: {changed} of {len(modules)} matrices changed (filled)")
    axes[0].legend(ncols=len(kinds), fontsize="small", loc="upper center", frameon=False)
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(low, high + 0.15 * (high - low))
    for axis in axes:
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _layer(name: str) -> int:
    found = re.search(r"layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _print(modules: Sequence[ModuleProjection], output: Path) -> None:
    changed = [module for module in modules if module.changed]
    table = Table(title=f"{len(changed)} of {len(modules)} matrices changed; the lowest cosines")
    for heading in ("module", "cosine", "changed", "norm before", "after"):
        table.add_column(heading, justify="left" if heading == "module" else "right")
    known = [module for module in modules if module.cosine == module.cosine]
    for m in sorted(known, key=lambda m: m.cosine)[:12]:
        norms = (f"{m.norm_before:.4g}", f"{m.norm_after:.4g}")
        table.add_row(m.name, f"{m.cosine:.3f}", "yes" if m.changed else "", *norms)
    console = Console()
    console.print(table)
    total = [torch.tensor([getattr(m, key) for m in modules]).norm() for key in
             ("norm_before", "norm_after")]  # fmt: skip
    console.print(f"Norm of the whole update: {total[0]:.4g} before, {total[1]:.4g} after.")
    console.print(f"Adapter:  {output / 'adapter'}", highlight=False, soft_wrap=True)
    console.print(f"Plot:     {output / 'safelora.png'}", highlight=False, soft_wrap=True)
