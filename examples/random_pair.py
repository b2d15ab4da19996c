"""The control of AsFT and SafeLoRA: a base whose difference to the aligned model means nothing.

    python examples/random_pair.py BASE ALIGNED OUT

Both defenses read a direction a matrix, V = aligned - base. OUT is a model folder as BASE is, with

    base' = aligned - U S W^T

in place of each matrix that differs: S are the singular values of its V, U and W random orthonormal
columns. So V' has V's norm, rank and spectrum, and another span. OUT is the BASE of such a run.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SMALLEST = 1e-5  # Of a matrix's largest singular value: below it is what rounding left.


def random_difference(difference: Tensor, generator: torch.Generator) -> Tensor:
    """A matrix with these singular values and random singular vectors."""
    sizes = torch.linalg.svdvals(difference)
    sizes = sizes[sizes > SMALLEST * sizes[0]]
    left, right = (
        torch.linalg.qr(torch.randn(size, len(sizes), generator=generator))[0]
        for size in difference.shape
    )
    return (left * sizes) @ right.T


def main(argv: Sequence[str] | None = None) -> int:
    """Write the folder; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    for name in ("base", "aligned", "out"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args(argv)
    if options.out.exists():
        parser.error(f"{options.out} is there already")
    files = [folder / "model.safetensors" for folder in (options.base, options.aligned)]
    for file in files:
        if not file.is_file():
            parser.error(f"no such file: {file}")
    generator = torch.Generator().manual_seed(0)
    base, aligned = map(load_file, files)
    if base.keys() != aligned.keys():
        parser.error(f"{files[0]} and {files[1]} are not of one architecture")
    found, changed = {}, 0
    for name, weight in base.items():
        difference = aligned[name].float() - weight.float()
        if weight.ndim == 2 and bool(difference.any()):
            weight = aligned[name].float() - random_difference(difference, generator)
            weight, changed = weight.to(base[name].dtype), changed + 1
        found[name] = weight
    shutil.copytree(options.base, options.out, ignore=shutil.ignore_patterns("model.safetensors"))
    save_file(found, options.out / "model.safetensors", metadata={"format": "pt"})
    print(f"{options.out}: {changed} matrices differ from the aligned ones at random")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
