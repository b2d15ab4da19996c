"""Answers scored a second, and sampled, with a prompt read once and with it read for every answer.

SmolLM2-135M-Instruct, rows of `configs/smollm2_135m_eval.yaml`: two answers to each question of
the general probe. The ways take turns, round by round; a way's time is this process's processor
time. Beside the ratio stand the tokens that each way reads, of which it can be no more, and the
largest difference of a token's likelihood.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from timing import describe_machine

from emarecipes.evaluation.checked import CheckedEvaluation
from emarecipes.models.batch import longest_first
from emarecipes.models.likelihoods import GivenAnswers
from emarecipes.models.loss_head import LossHead
from emarecipes.models.sampling import reading
from emarecipes.models.sampling.draw import Sampling
from emarecipes.models.sampling.given import nll_by_prompt
from emarecipes.models.sampling.prompts import encode_prompt
from emarecipes.models.sampling.sampler import sample_answers
from emarecipes.models.source import load_model
from emarecipes.probes.contrast import answer_row
from emarecipes.probes.pairs import exchange

REPO = Path(__file__).resolve().parents[1]
CONFIG = REPO / "configs" / "smollm2_135m_eval.yaml"
BATCH = 8
SENTENCE = "Answer in the way that a careful friend would, who has time for you."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--sentences", type=int, default=0, help="of a system prompt in each row")
    options = parser.parse_args()
    system = " ".join([SENTENCE] * options.sentences) or None
    lines = (REPO / "data/general_probe/select.jsonl").read_text(encoding="utf-8").splitlines()
    asked = [json.loads(line) for line in lines[: options.questions]]
    with tempfile.TemporaryDirectory() as scratch:
        run = CheckedEvaluation(
            ["--config", str(CONFIG), f"output_dir={scratch}", "adapters={}",
             "device=cpu", f"model_dir={REPO / 'models/smollm2-135m-instruct'}"]
        )  # fmt: skip
    head = LossHead(load_model(run.cfg))
    rows = [
        answer_row(run.tokenizer, exchange(one["question"], one[kind], system)).sample
        for one in asked
        for kind in ("aligned", "misaligned")
    ]
    answers = GivenAnswers(
        rows, run.tokenizer.pad_id, run.cfg.pad_to_multiple_of, torch.device("cpu")
    )
    prompts = [encode_prompt(run.tokenizer, system, one["question"]) for one in asked]
    seen = [0]
    head.model.tok_embeddings.register_forward_hook(
        lambda layer, given, output: seen.__setitem__(0, seen[0] + given[0].numel())
    )

    def whole() -> dict[int, torch.Tensor]:
        batches = longest_first([row["tokens"] for row in rows], BATCH)
        return values(answers.nll(head, batches, reference=True))

    def once() -> dict[int, torch.Tensor]:
        return values(nll_by_prompt(answers, head, BATCH, reference=True))

    def sampled() -> int:
        sampling = Sampling(options.new_tokens, stop_tokens=(), temperature=1.0)
        return len(sample_answers(head, prompts, range(len(prompts)), sampling, batch_size=32))

    def sampled_whole() -> int:
        with patch.object(reading, "has_windows", return_value=True):
            return sampled()

    a, b = whole(), once()
    difference = max(float((a[row] - b[row]).abs().max()) for row in a)
    table = Table("", "read", "tokens", "CPU seconds", "answers a CPU second", "ratio")
    ways: dict[str, dict[str, Callable[[], object]]] = {
        "scored": {"for every answer": whole, "once": once},
        "sampled": {"for every answer": sampled_whole, "once": sampled},
    }
    for name, pair in ways.items():
        times: dict[str, list[float]] = {way: [] for way in pair}
        tokens: dict[str, int] = {}
        for repetition in range(options.repetitions + 1):
            for way, act in pair.items():
                seen[0], started = 0, time.process_time()
                act()
                if repetition:
                    times[way].append(time.process_time() - started)
                tokens[way] = seen[0]
        first = statistics.median(times["for every answer"])
        count = len(rows) if name == "scored" else len(prompts)
        for way, took in times.items():
            seconds = statistics.median(took)
            cells = (f"{seconds:.1f}", f"{count / seconds:.2f}", f"{first / seconds:.2f}")
            table.add_row(name, way, str(tokens[way]), *cells)
    print(f"{describe_machine()}; largest difference of a token's likelihood {difference:.1e} nats")
    Console(width=120).print(table)


def values(found: object) -> dict[int, torch.Tensor]:
    by_row: dict[int, torch.Tensor] = {}
    for numbers, nll_T, tokens_B in found:  # type: ignore[attr-defined]
        by_row |= dict(zip(numbers, nll_T.split(tokens_B.tolist()), strict=True))
    return by_row


if __name__ == "__main__":
    main()
