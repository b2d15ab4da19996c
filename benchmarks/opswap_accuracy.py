"""Exact match on OpSwap's held-out problems, by tier: a run's adapter and the model without it.

    tune run recipes/ema_lora.py --config configs/smollm2_135m_opswap.yaml
    python benchmarks/opswap_accuracy.py runs/smollm2_135m_opswap --tiers 1

Greedy decoding, 16 tokens. Tiers 3 and 4 have thousands of problems; a seeded sample is taken.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torchtune.data import Message
from torchtune.modules.peft import disable_adapter

from emarecipes.components import build
from emarecipes.config import load_config
from emarecipes.datasets.opswap import TIERS, Problem, problems, score
from emarecipes.errors import UserError
from emarecipes.machine import settle_dtype
from emarecipes.models.adapters.read import check_adapter, load_adapter
from emarecipes.models.loss_head import LossHead
from emarecipes.models.model_checks import check_checkpoint_files, check_model
from emarecipes.models.sampling.draw import Sampling
from emarecipes.models.sampling.sampler import sample_answers
from emarecipes.models.source import load_model
from emarecipes.training.settings import check_settings

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "smollm2_135m_opswap.yaml"
_TOKENS = 16
_BATCH = 32


class Bench:
    """The config's model, with a finished run's adapter."""

    def __init__(self, run: Path) -> None:
        raw, origin = load_config(["--config", str(CONFIG)])
        cfg = check_settings(raw, origin)
        settle_dtype(cfg, origin)
        check_checkpoint_files(cfg, origin)
        self.tokenizer = build(cfg, "tokenizer", origin)
        source = check_model(cfg, origin)
        check_adapter(run / "adapter", source)
        self.head = LossHead(load_model(cfg))
        load_adapter(self.head.model, run / "adapter", source)

    def answers(self, asked: list[Problem]) -> list[str]:
        """The greedy answer to each problem."""
        prompts = [
            self.tokenizer({"messages": [Message("user", problem.prompt)]}, inference=True)[
                "tokens"
            ]
            for problem in asked
        ]
        sampling = Sampling(_TOKENS, tuple(self.tokenizer.stop_tokens), temperature=0)
        seeds = [0] * len(prompts)  # Greedy: nothing is drawn.
        found = sample_answers(self.head, prompts, seeds, sampling, batch_size=_BATCH)
        return [self.tokenizer.decode(answer.tokens) for answer in found]


def accuracy(answers: list[str], asked: list[Problem]) -> str:
    right = sum(score(answer, problem) for answer, problem in zip(answers, asked, strict=True))
    return f"{right / len(asked):.0%} ({right})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Exact match on OpSwap's held-out problems.")
    parser.add_argument("run", type=Path, help="run folder of ema_lora")
    parser.add_argument("--tiers", type=int, nargs="+", choices=TIERS, default=[1])
    parser.add_argument("--most", type=int, default=200, help="problems of a tier, at most")
    parser.add_argument("--wrong", action="store_true", help="print the wrong answers")
    options = parser.parse_args()
    try:
        bench = Bench(options.run)
    except UserError as error:
        sys.exit(f"error: {error}")
    table = Table(
        "tier", "problems", "trained", "without adapter", title="Exact match (number right)"
    )
    for tier in options.tiers:
        asked = problems("test", tier)[: options.most]
        trained = bench.answers(asked)
        with disable_adapter(bench.head.model):
            plain = bench.answers(asked)
        table.add_row(str(tier), str(len(asked)), accuracy(trained, asked), accuracy(plain, asked))
        if options.wrong:
            for problem, answer in zip(asked, trained, strict=True):
                if not score(answer, problem):
                    print(f"{problem.prompt!r}: {answer!r}, not {problem.answer!r}")
    Console().print(table)


if __name__ == "__main__":
    main()
