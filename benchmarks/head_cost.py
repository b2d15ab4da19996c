"""The plain cross entropy: our loss head beside whole logits, each with and without compiling.

"Whole logits, compiled" is what cut-cross-entropy's `impl="torch_compile"` does, the one of its
forms that needs no Triton; Liger has none. Sizes are SmolLM2's: 616 positions (4 rows of 256, 40 %
prompt), width 576, vocabulary 49152, a frozen bf16 output layer. Medians of interleaved repetitions
of loss and gradient; MB: growth of resident memory to the peak, each arm in a process of its own.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from plan_check import resident_mb
from rich.console import Console
from rich.table import Table
from step_cost import describe_machine, peak_mb
from torch import Tensor, nn
from torch.nn import functional as F
from torchtune.modules import TiedLinear

from emarecipes.models.loss_head import LossHead, Request, Term, cross_entropy

POSITIONS, WIDTH, VOCABULARY = 616, 576, 49152


class Output(nn.Module):
    """What the loss head asks of a decoder: a tied output layer and the norm before it."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, WIDTH, dtype=torch.bfloat16)
        self.tok_embeddings.weight.requires_grad_(False).mul_(0.02)
        self.norm = nn.Identity()
        self.output = TiedLinear(self.tok_embeddings)


def chunked(*, compiled: bool) -> Callable[[Tensor, Tensor], Tensor]:
    head = LossHead(Output(), compiled=compiled)

    def loss(hidden_TD: Tensor, targets_T: Tensor) -> Tensor:
        everywhere_BS = torch.ones(1, len(targets_T), dtype=torch.bool)
        term = Term("ce", cross_entropy, everywhere_BS, 1 / len(targets_T))
        with head.computing(Request([term], targets_T[None])):
            return head(hidden_TD[None])

    return loss


def whole(*, compiled: bool) -> Callable[[Tensor, Tensor], Tensor]:
    weight_VD = Output().tok_embeddings.weight

    def loss(hidden_TD: Tensor, targets_T: Tensor) -> Tensor:
        return F.cross_entropy((hidden_TD @ weight_VD.T).float(), targets_T)

    return torch.compile(loss) if compiled else loss


ARMS: dict[str, Callable[[], Callable[[Tensor, Tensor], Tensor]]] = {
    "loss head": lambda: chunked(compiled=False),
    "loss head, compiled": lambda: chunked(compiled=True),
    "whole logits": lambda: whole(compiled=False),
    "whole logits, compiled": lambda: whole(compiled=True),
}


def build(name: str) -> Callable[[], tuple[float, float]]:
    """A step of one arm: loss and the gradient's norm."""
    torch.manual_seed(0)
    loss_of = ARMS[name]()
    generator = torch.Generator().manual_seed(1)
    values_TD = torch.randn(POSITIONS, WIDTH, generator=generator).bfloat16()
    targets_T = torch.randint(VOCABULARY, (POSITIONS,), generator=generator)

    def step() -> tuple[float, float]:
        hidden_TD = values_TD.clone().requires_grad_()
        loss = loss_of(hidden_TD, targets_T)
        loss.backward()
        assert hidden_TD.grad is not None
        return loss.item(), hidden_TD.grad.float().norm().item()

    return step


def growth_of(name: str) -> float:
    """MB from after a first step (compilation, libraries) to the peak of three more."""
    step = build(name)
    step()
    Path("/proc/self/clear_refs").write_text("5")  # Sets the peak back to what is resident now.
    before = resident_mb()
    for _ in range(3):
        step()
    return peak_mb() - before


def main() -> None:
    parser = argparse.ArgumentParser(description="The cross entropy of one step, four ways.")
    parser.add_argument("--quick", action="store_true", help="3 repetitions")
    parser.add_argument("--arm", choices=ARMS, help="print this arm's memory alone, in MB")
    options = parser.parse_args()
    if options.arm:
        return print(growth_of(options.arm))
    print(describe_machine())
    # As in step_cost.py: freed tensors go back at once, so that each arm's peak is its own.
    command = ["env", "MALLOC_MMAP_THRESHOLD_=131072", sys.executable, __file__, "--arm"]
    memory = {name: float(subprocess.check_output([*command, name])) for name in ARMS}
    steps = {name: build(name) for name in ARMS}
    found = {name: step() for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    for _ in range(3 if options.quick else 15):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    table = Table("", "loss", "|grad|", "seconds", "MB")
    for name, (loss, norm) in found.items():
        median = statistics.median(seconds[name])
        table.add_row(name, f"{loss:.4f}", f"{norm:.5f}", f"{median:.3f}", f"{memory[name]:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
