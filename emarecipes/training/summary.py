"""What the console shows when a run has ended."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from emarecipes.training.checkpoint import Counters
from emarecipes.training.step import TrainingLoss


def print_summary(
    loss: TrainingLoss,
    counters: Counters,
    dropped_rows: int,
    *,
    output_dir: Path,
    ended: str | None,
) -> None:
    """Print steps, tokens, time, and each term's first and last value, and where to look next.

    Args:
        loss: For the terms' names and weights.
        counters: The run's.
        dropped_rows: Rows without a label.
        output_dir: The run's folder.
        ended: Why it ended before its last step, if it did.
    """
    steps, first, last = counters.step, counters.first, counters.last
    plural = "s" if steps > 1 else ""
    table = Table(
        title=f"{steps} step{plural}, {counters.tokens:,} tokens, {counters.seconds:.0f} s"
    )
    table.add_column("term")
    for heading in ("weight", "first", "last"):
        table.add_column(heading, justify="right")
    if "loss" in first:  # Else every step was skipped.
        table.add_row("loss", "", f"{first['loss']:.4f}", f"{last['loss']:.4f}", style="bold")
    for name, weight in zip(loss.names, loss.weights, strict=True):
        if name in first:
            table.add_row(name, f"{weight:g}", f"{first[name]:.4f}", f"{last[name]:.4f}")
    console = Console()
    console.print(table)
    if ended is not None:
        console.print(f"{ended}.", highlight=False, soft_wrap=True)
    idle = [n for n, w in zip(loss.names, loss.weights, strict=True) if w and n not in first]
    if idle and "loss" in first:
        console.print(f"No step had rows for {', '.join(idle)}: without effect in this run.")
    if counters.skipped:
        console.print(f"{counters.skipped} steps were skipped: a number was not finite.")
    if dropped_rows:
        console.print(f"{dropped_rows} rows had no label left (max_seq_len) and were dropped.")
    console.print(f"Run folder:   {output_dir}", highlight=False, soft_wrap=True)
    console.print(
        f"TensorBoard:  tensorboard --logdir {output_dir}", highlight=False, soft_wrap=True
    )
