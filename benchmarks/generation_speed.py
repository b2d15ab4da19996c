"""Sampling from SmolLM2-135M-Instruct: ours beside transformers' `generate`.

Both answer the same prompts of one length with the same number of tokens (nothing stops early), at
temperature 1 from the whole vocabulary, in bf16; with an adapter also against PEFT. The arms take
turns in one process; medians after one warm-up. The machine must be idle.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from torchtune.modules.peft import disable_adapter, get_adapter_params

from emarecipes.config import load_config
from emarecipes.generation.checked import check_generate_settings
from emarecipes.models.adapters.export import save_adapter
from emarecipes.models.loss_head import LossHead
from emarecipes.models.sampling.draw import Sampling
from emarecipes.models.sampling.sampler import sample_batch
from emarecipes.models.source import load_model

CONFIG = Path(__file__).parent.parent / "configs" / "smollm2_135m_generate.yaml"
PROMPT_TOKENS = 48


def build_arms(rows: int, tokens: int, scratch: str) -> dict[str, Callable[[], object]]:
    """What each arm runs; all see the same prompts, every prompt another."""
    raw, origin = load_config(["--config", str(CONFIG), f"output_dir={scratch}", "device=cpu"])
    cfg = check_generate_settings(raw, origin)
    base = Path(cfg.checkpointer.checkpoint_dir).resolve()
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(100, 40_000, (rows, PROMPT_TOKENS), generator=generator)
    model = load_model(cfg)
    head = LossHead(model)
    adapter = get_adapter_params(model)
    for weight in adapter.values():
        weight.copy_(0.02 * torch.randn(weight.shape, generator=generator))
    folder = Path(scratch) / "adapter"
    where = (model, str(cfg.checkpointer.model_type), base, folder)
    rank, alpha = cfg.model.lora_rank, cfg.model.lora_alpha
    save_adapter(dict(adapter), *where, rank=rank, alpha=alpha)
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    other: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    peft = PeftModel.from_pretrained(other, folder, autocast_adapter_dtype=False)

    def ours() -> None:
        sample_batch(head, prompts.tolist(), range(rows), Sampling(tokens, stop_tokens=()))

    def ours_without() -> None:
        with disable_adapter(model):
            ours()

    def theirs(of: Any) -> None:
        of.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            top_k=0,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            pad_token_id=0,
        )

    return {
        "ours, base": ours_without,
        "transformers, base": lambda: theirs(plain),
        "ours, adapter": ours,
        "transformers + PEFT, adapter": lambda: theirs(peft),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of sampling.")
    parser.add_argument("--repetitions", type=int, default=5, help="timed runs of each arm")
    parser.add_argument("--rows", type=int, default=16, help="answers in the batch")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--quick", action="store_true", help="2 repetitions, 32 tokens")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    if options.quick:
        options.repetitions, options.tokens = 2, 32
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        arms = build_arms(options.rows, options.tokens, scratch)
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for repetition in range(1 + options.repetitions):
            for name, run in arms.items():
                started = time.perf_counter()
                run()
                if repetition > 0:
                    seconds[name].append(time.perf_counter() - started)
    medians = {name: float(np.median(all_runs)) for name, all_runs in seconds.items()}
    if options.json:
        options.json.write_text(json.dumps(seconds, indent=2))
    table = Table("", "seconds, median", "tokens a second")
    for name, median in medians.items():
        table.add_row(name, f"{median:.2f}", f"{options.rows * options.tokens / median:.0f}")
    Console().print(table)
    for kind, name in (("base", "transformers, base"), ("adapter", "transformers + PEFT, adapter")):
        ratio = medians[f"ours, {kind}"] / medians[name]
        verdict = "reached" if ratio <= 1 else "not reached"
        print(f"ours, {kind} / {name} = {ratio:.2f}, at most 1: {verdict}")


if __name__ == "__main__":
    main()
