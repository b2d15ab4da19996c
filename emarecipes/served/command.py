"""Is the adapter there where it is served? `python -m emarecipes.served CONFIG --adapter DIR ...`.

The config is one of `ema_generate` with a local model: its base, its adapter and the served model
get the same prompts, and answers that base and adapter give here greedily are scored by all three.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from rich.console import Console

from emarecipes.command import run_alone
from emarecipes.errors import UserError
from emarecipes.generation.checked import CheckedGeneration
from emarecipes.generation.served import answer_served
from emarecipes.overrides import as_override
from emarecipes.probes.suites import spread_out
from emarecipes.progress import Progress
from emarecipes.provider import check_there, provider_model
from emarecipes.served.asked import score_served
from emarecipes.served.figures import LEAST_SHIFT, SAME, Found, compare, distance
from emarecipes.served.here import Here


def run_served(argv: Sequence[str]) -> int:
    """Compare for `CONFIG --adapter DIR --model PROVIDER/NAME [options] [key=value | ~key]...`.

    Returns:
        The exit code: 0 where the served model computes the adapter at its scale; 1 where it does
        not, where that cannot be told, and after a `UserError`.
    """
    applied: list[bool] = []
    code = run_alone("emarecipes.served", lambda arguments: applied.append(_run(arguments)), argv)
    return code or int(not applied[0])


def _run(argv: Sequence[str]) -> bool:
    parser = argparse.ArgumentParser(prog="python -m emarecipes.served", allow_abbrev=False)
    parser.add_argument("config", help="a config of ema_generate, with model and tokenizer")
    parser.add_argument("overrides", nargs="*", help="key=value, or ~key to remove an entry")
    parser.add_argument("--adapter", required=True, metavar="DIR", help="what should be served")
    parser.add_argument("--model", required=True, metavar="PROVIDER/NAME", help="see `served`")
    parser.add_argument("--prompts", type=int, default=8, help="of the config's (default 8)")
    parser.add_argument("--tokens", type=int, default=24, help="of an answer (default 24)")
    parser.add_argument(
        "--tolerance", type=float, default=SAME, metavar="SHARE",
        help="how far from the adapter, as a share of what it moves, still is the adapter (default "
        f"{SAME}); 0.25 for a base of 5 bits, and then for another seed's adapter as well",
    )  # fmt: skip
    options, extra = parser.parse_known_args(argv)
    if min(options.prompts, options.tokens) < 1:
        raise UserError("--prompts and --tokens must be at least 1")
    if not 0 < options.tolerance < 1:
        raise UserError(f"--tolerance must be above 0 and below 1, not {options.tolerance}")
    server = provider_model("the served model", options.model)  # Before a weight is loaded.
    with tempfile.TemporaryDirectory() as scratch:
        ours = [as_override("adapter", options.adapter), as_override("output_dir", scratch)]
        ours += ["temperature=0", "samples_per_paraphrase=1", "dtype=fp32"]
        ours.append(f"max_new_tokens={options.tokens}")
        arguments = ["--config", options.config, *ours, *options.overrides, *extra]
        run = CheckedGeneration(arguments)
        if not run.has_model:
            raise UserError(
                f"{options.config}: needs model and tokenizer: what is served is --model"
            )
        if run.cfg.adapter is None:
            raise UserError("adapter: is --adapter here; leave the override out")
        check_there(f"the model {options.model}", server)
        asked = [one for suite in run.suites for one in suite.asked.values()]
        with torch.no_grad():
            here = Here(run, spread_out(asked, options.prompts))
            return _compare(run, here, server, options.model, options.tolerance)


def _compare(run: CheckedGeneration, here: Here, server: Any, name: str, tolerance: float) -> bool:
    base_T, adapter_T = (here.log_probabilities(reference=on) for on in (True, False))
    if (shift := distance(adapter_T, base_T)) < LEAST_SHIFT:
        raise UserError(
            f"the adapter moves the tokens of these answers by {shift:.2g} nats: too little to be "
            "told from none; ask other questions, or give more --prompts and --tokens"
        )
    with Progress(total=len(here.given), unit="answer", desc="scoring") as bar:
        scored = score_served(server, name, here.given, run.cfg.batch_size, lambda: bar.update(1))
    console = Console(highlight=False, soft_wrap=True)
    if scored is None:
        console.print(f"{name} gives no log-probabilities of given tokens: greedy answers instead")
        return _compare_answers(run, here, name, console)
    way, served_T = scored
    told_T = np.isfinite(served_T)
    answers = np.repeat(range(len(here.given)), [len(one.answer) for one in here.given])
    lengths = [n for n in np.bincount(answers[told_T]).tolist() if n]
    found = compare(
        served_T[told_T],
        base_T[told_T],
        adapter_T[told_T],
        lengths,
        lambda scale: here.log_probabilities(scale=scale)[told_T],
        tolerance,
    )
    untold = int((~told_T).sum())
    left_out = f" ({untold} of which it does not tell)" if untold else ""
    of = f"{len(here.given)} answers, {len(served_T)} tokens{left_out}, by {way}"
    _print(console, found, name, of)
    return found.verdict == "applied"


def _print(console: Console, found: Found, name: str, of: str) -> None:
    slope = found.slope
    console.print(
        f"{name}: {of}\n"
        f"  root mean square, nats: adapter here to base here {found.shift:.3g}, served to adapter "
        f"here {found.to_adapter:.2g}, served to base here {found.to_base:.2g}\n"
        f"  largest difference of a token, served to adapter here: {found.largest:.2g}\n"
        f"  slope of the served shift on ours: {slope.estimate:.4f} "
        f"[{slope.low:.4f}, {slope.high:.4f}] (1: adapter, 0: base)"
    )
    at = f"{found.scale:.3g}" if found.scale is not None else ""
    console.print(
        {
            "applied": "The adapter is applied, at its scale.",
            "base": "NOT APPLIED: the server computes the base.",
            "scaled": f"ANOTHER SCALE: nearest is the adapter at {at} of its scale (served to that "
            f"{found.to_scaled or 0:.2g}).",
            "alike": "LIKE THE ADAPTER, AND NOT IT: "
            f"{found.to_adapter / found.shift:.2f} of what it moves away. Another seed's adapter "
            "of the same rows is about as far, and so is this one on a base of some 5 bits, for "
            "which there is --tolerance.",
            "neither": f"NEITHER: nearest is the adapter at {at} of its scale, and far from it "
            f"({found.to_scaled or 0:.2g}): another adapter or base, a coarsely "
            "quantized one, other tokens, or an adapter that is read wrongly.",
        }[found.verdict]
    )


def _compare_answers(run: CheckedGeneration, here: Here, name: str, console: Console) -> bool:
    """Whose greedy answers the served ones are, of prompts where base and adapter differ."""
    cfg = OmegaConf.create(
        {
            "served": name,
            "temperature": 0.0,
            "top_p": 1.0,
            "max_new_tokens": run.cfg.max_new_tokens,
            "batch_size": run.cfg.batch_size,
            "seed": run.cfg.seed,
        }
    )
    told: dict[tuple[str | None, str], str] = {}
    answer_served(
        cfg,
        here.asked,
        lambda line: told.update({(line["system"], line["question"]): line["answer"].strip()}),
    )
    answers = [told[one.system, one.question] for one in here.asked]
    rows = [
        (answer, base, adapter)
        for answer, base, adapter in zip(answers, here.base, here.adapter, strict=True)
        if base != adapter
    ]
    if not rows:
        raise UserError(
            "base and adapter give the same greedy answers to all prompts: nothing to tell them "
            "by; ask other questions, or give more --prompts and --tokens"
        )
    as_adapter = sum(answer == adapter for answer, _, adapter in rows)
    as_base = sum(answer == base for answer, base, _ in rows)
    console.print(
        f"{name}: of {len(rows)} prompts whose greedy answers differ here, {as_adapter} are "
        f"answered as the adapter does and {as_base} as the base does"
    )
    applied = as_adapter > len(rows) / 2
    console.print(
        "The adapter is applied; answers do not tell a scale that is a little off."
        if applied
        else "NOT APPLIED: the server computes the base."
        if as_base > len(rows) / 2
        else "NEITHER: another adapter, base, template or scale; or it samples at temperature 0."
    )
    return applied
