"""What each defense costs: a step's time and memory over the undefended step, and SafeLoRA's act.

Steps: as in step_cost.py, whose setting, fairness and caveats hold here too. The last steps of a
run are timed, so what happens once or every so many steps (SafeLoRA, the comparison of gradients)
is not in them.

SafeLoRA: the projection of one adapter of SmolLM2-135M (210 matrices), from the adapter in memory
and two folders on disk to new B matrices, beside two dense forms: the published algorithm as its
authors' code has it (both models loaded by transformers, C formed for every matrix and kept, two
passes), and one pared down (safetensors, one C at a time, one pass). Each in a process of its own,
from a warm file cache; memory is the peak over what was held before.
"""

from __future__ import annotations

import copy
import gc
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from step_cost import (
    Defenses,
    Setting,
    Trainer,
    describe_machine,
    in_torchtune,
    measure_memory,
    measure_time,
    peak_mb,
    peak_of_arm,
    step_options,
    verdict,
)
from torch.nn import functional as F

from emarecipes.defenses import FeatureL2, KLToReference, PersonaSteering, SafeLoRA
from emarecipes.models.adapters.layout import ModuleRows

Lora = dict[str, tuple[torch.Tensor, torch.Tensor]]

DEPTH, WIDTH, RANK = 30, 576, 32
VECTORS = Path(tempfile.gettempdir()) / "emarecipes_benchmark_vectors.safetensors"


def persona() -> PersonaSteering:
    if not VECTORS.exists():
        save_file({"persona": torch.randn(DEPTH + 1, WIDTH)}, VECTORS)
    return PersonaSteering(str(VECTORS), layer=20, alpha=0.1)


def defenses(names: str) -> Defenses:
    made = {"KL": KLToReference, "FeatureL2": FeatureL2, "PersonaSteering": persona}
    return {name.lower(): made[name]() for name in names.split(" + ") if name in made}


NAMES = (
    "no defense",
    "KL",
    "FeatureL2",
    "PersonaSteering",
    "KL + FeatureL2",
    "KL + FeatureL2 + PersonaSteering",
)
ARMS = {n: lambda s, n=n: in_torchtune(s, "ours", defenses(n)) for n in NAMES}


def safelora_ours(base: Path, aligned: Path, lora: Lora) -> dict[str, torch.Tensor]:
    defense = SafeLoRA(str(base), str(aligned), num_layers=10)
    shapes = {f"{n}.weight": (len(b), a.shape[1]) for n, (a, b) in lora.items()}
    defense.open_folders(shapes)
    modules = {n: ModuleRows(f"{n}.weight", shapes[f"{n}.weight"], None) for n in lora}
    found = defense.project(lora, modules, torch.device("cpu"), quiet=True)
    return {module.name: module.b_OR for module in found}


def safelora_published(base: Path, aligned: Path, lora: Lora) -> dict[str, torch.Tensor]:
    """What the authors' code does, step by step, but for the copy that it makes of the whole model.

    The first pass over the layers finds their cosines, the second uses the tenth as its threshold.
    """
    models = [transformers.AutoModelForCausalLM.from_pretrained(f) for f in (base, aligned)]
    weights = [dict(model.named_parameters()) for model in models]
    every_c = {}
    for name in lora:
        v = weights[1][f"{name}.weight"] - weights[0][f"{name}.weight"]
        every_c[name] = (v @ v.T / torch.norm(v)).detach()
    original, projected = copy.deepcopy(lora), dict.fromkeys(lora, torch.empty(0))
    limit = 0.3
    for _ in range(2):
        cosines, distances = [], []
        for name, (a, b) in original.items():
            a = copy.deepcopy(a)
            new_b = every_c[name] @ b
            new_update, update = new_b @ a, b @ a
            again = every_c[name] @ b
            cosine = F.cosine_similarity(new_update.reshape(1, -1), update.reshape(1, -1))
            cosines.append(round(cosine.item(), 5))
            projected[name] = again if cosines[-1] <= limit else b
            distances.append(1 / (1 + torch.norm(projected[name] - new_b)).item())
        limit = sorted(cosines)[9]
    return projected


def safelora_dense(base: Path, aligned: Path, lora: Lora) -> dict[str, torch.Tensor]:
    """The same from safetensors, in one pass: the least that the dense form can cost."""
    base_weights, aligned_weights = (load_file(f / "model.safetensors") for f in (base, aligned))
    projected, cosines = {}, {}
    for name, (a, b) in lora.items():
        v = aligned_weights[f"{name}.weight"].float() - base_weights[f"{name}.weight"].float()
        projected[name] = v @ v.T / torch.linalg.matrix_norm(v) @ b
        update, new_update = b @ a, projected[name] @ a
        cosine = F.cosine_similarity(new_update.view(1, -1), update.view(1, -1))
        cosines[name] = round(float(cosine), 5)
    limit = sorted(cosines.values())[9]
    return {n: projected[n] if cosines[n] <= limit else b for n, (_, b) in lora.items()}


PROJECTIONS = {
    "SafeLoRA, ours": safelora_ours,
    "SafeLoRA, as published": safelora_published,
    "SafeLoRA, dense, at its leanest": safelora_dense,
}


def load_lora(path: Path) -> Lora:
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    return {k[:-2]: (a, tensors[f"{k[:-2]}.B"]) for k, a in tensors.items() if k.endswith(".A")}


def write_pair(folder: Path, instruct: Path) -> None:
    """An "aligned" model (the instruct model, changed a little) and a random adapter."""
    torch.manual_seed(0)
    weights = load_file(instruct / "model.safetensors")
    lora, aligned = {}, {}
    for key, weight in weights.items():
        aligned[key] = weight
        if weight.dim() == 2 and ".layers." in key:
            name = key.removesuffix(".weight")
            change = torch.randn(len(weight), 8) @ torch.randn(8, weight.shape[1])
            aligned[key] = (weight.float() + 0.01 * change).to(weight.dtype)
            lora[f"{name}.A"] = torch.randn(RANK, weight.shape[1])
            lora[f"{name}.B"] = torch.randn(len(weight), RANK)
    (folder / "aligned").mkdir()
    (folder / "aligned" / "config.json").write_bytes((instruct / "config.json").read_bytes())
    save_file(aligned, folder / "aligned" / "model.safetensors", metadata={"format": "pt"})
    save_file(lora, folder / "adapter.safetensors")


def measure_projection(name: str, folder: Path, instruct: Path, output: Path) -> dict[str, float]:
    folders = (instruct, folder / "aligned")
    for path in folders:
        (path / "model.safetensors").read_bytes()  # Warm cache.
    lora = load_lora(folder / "adapter.safetensors")  # At a run's end it is in memory.
    torch.randn(2000, 2000) @ torch.randn(2000, 2000)  # Threads and kernels are there.
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before, started = peak_mb(), time.perf_counter()
    found = PROJECTIONS[name](*folders, lora)
    figures = {"seconds": time.perf_counter() - started, "peak MB": peak_mb() - before}
    save_file({key: tensor.contiguous() for key, tensor in found.items()}, output)
    return figures


def compare_projections(instruct: Path, repetitions: int) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_pair(folder, instruct)
        figures: dict[str, list[dict[str, float]]] = {name: [] for name in PROJECTIONS}
        for _ in range(repetitions):
            for name, found in figures.items():
                command = [sys.executable, sys.argv[0], "--projection", name]
                command += ["--folder", scratch, "--instruct", str(instruct)]
                found.append(json.loads(subprocess.check_output(command).splitlines()[-1]))
        ours, dense, _ = (load_file(folder / f"{name}.out") for name in PROJECTIONS)
        worst = max(float((ours[k] - dense[k]).norm() / dense[k].norm()) for k in dense)
    if worst > 1e-4:
        sys.exit(f"the two projections differ by {worst:.1e}")
    return {
        name: {key: statistics.median(run[key] for run in found) for key in ("seconds", "peak MB")}
        for name, found in figures.items()
    }


def report(steps: Any, projections: dict[str, dict[str, float]], quick: bool) -> None:
    table = Table("", "forwards", "seconds", "IQR", "peak MB", "time ratio", "memory ratio")
    plain = steps["no defense"]
    for name, figure in steps.items():
        forwards = "2" if "KL" in name or "FeatureL2" in name else "1"
        cells = (f"{figure['seconds']:.2f}", f"{figure['IQR']:.2f}", f"{figure['peak MB']:.0f}")
        ratios = (figure[key] / plain[key] for key in ("seconds", "peak MB"))
        table.add_row(name, forwards, *cells, *(f"{ratio:.2f}" for ratio in ratios))
    Console(width=110).print(table)
    ratio = steps[NAMES[-1]]["seconds"] / plain["seconds"]
    print(f"{NAMES[-1]}: {ratio:.2f} of the undefended step, {verdict(ratio, 1.55, quick)}")
    table = Table("", "seconds", "peak MB")
    for name, figure in projections.items():
        table.add_row(name, f"{figure['seconds']:.2f}", f"{figure['peak MB']:.0f}")
    Console(width=110).print(table)
    ours, published, leanest = projections.values()
    for key, word in (("seconds", "time"), ("peak MB", "memory")):
        ratio = ours[key] / published[key]
        print(f"{word}: ours / as published = {ratio:.3f}, {verdict(ratio, 0.1)}")
        print(f"{word}: ours / dense at its leanest = {ours[key] / leanest[key]:.3f}")


def main() -> None:
    parser = step_options("What each defense costs.", ARMS)
    parser.add_argument("--projection", choices=PROJECTIONS, help="measure this projection alone")
    parser.add_argument("--folder", type=Path, help="with --projection: its inputs")
    parser.add_argument("--instruct", type=Path, help="with --projection: the model folder")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    if options.projection:
        output = options.folder / f"{options.projection}.out"
        arguments = (options.projection, options.folder, options.instruct, output)
        return print(json.dumps(measure_projection(*arguments)))
    with tempfile.TemporaryDirectory() as scratch:
        setting = Setting(scratch, options.dtype)
        batch = setting.batch(rows=2 if options.quick else 4)
        if options.memory:
            trainer = Trainer(*ARMS[options.arm](setting))
            return print(measure_memory(trainer, setting.batch(1, length=16), batch))
        machine = describe_machine()
        names = (NAMES[0], NAMES[1], NAMES[-1]) if options.quick else NAMES
        projections = compare_projections(setting.base, 1 if options.quick else options.repetitions)
        peaks = {name: peak_of_arm(name, options.dtype) for name in names}
        trainers = {name: Trainer(*ARMS[name](setting)) for name in names}
        steps = measure_time(trainers, batch, 3 if options.quick else options.repetitions, peaks)
    if options.json:
        figures = {"machine": machine, "steps": steps, "projections": projections}
        options.json.write_text(json.dumps(figures, indent=2))
    print(f"{batch.inputs['tokens'].numel()} tokens a step, {options.dtype}, {machine}")
    report(steps, projections, options.quick)


if __name__ == "__main__":
    main()
