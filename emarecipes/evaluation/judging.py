"""Answers before judges: which prompts, how many calls, what is asked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from emarecipes.datasets.questions import load_questions
from emarecipes.errors import UserError
from emarecipes.evaluation.answers import Answer
from emarecipes.files import json_lines, write_text
from emarecipes.judges.calls import ask, fill
from emarecipes.judges.reply import Reply
from emarecipes.progress import Progress

FAILED = "judge_failed.jsonl"
ALIGNED, COHERENT = "aligned", "coherent"
Prompts = Mapping[str, str]
# So many scores, none of them larger: of a prompt that asks for another scale.
_FEW, _OTHER_SCALE = 10, 10


@dataclass
class Judged:
    """An answer with what judges replied, by judge and metric (`aligned`, `coherent`, ...)."""

    adapter: str
    answer: Answer
    replies: dict[str, dict[str, Reply]] = field(default_factory=dict)


def read_judge_prompts(path: Path) -> dict[str, Prompts]:
    """The judge prompts of a question file, by question id.

    Raises:
        UserError: See `load_questions`; or a question lacks the prompts `aligned` and `coherent`,
            or a prompt a placeholder.
    """
    found: dict[str, Prompts] = {}
    for question in load_questions(path):
        where = f"{path}: question {question.id}"
        if not {ALIGNED, COHERENT} <= question.judge_prompts.keys():
            raise UserError(f"{where}: needs judge_prompts with {ALIGNED} and {COHERENT}")
        for metric, text in question.judge_prompts.items():
            if "{question}" not in text or "{answer}" not in text:
                raise UserError(
                    f"{where}: {metric} needs the placeholders {{question}}, {{answer}}"
                )
        found[question.id] = question.judge_prompts
    return found


class Judgement:
    """All calls of an evaluation: known before the first one is made.

    Args:
        cfg: The checked entry `judge`.
        answers: By adapter and file.

    Raises:
        UserError: A question without judge prompts, or more calls than `max_calls`.
    """

    def __init__(self, cfg: DictConfig, answers: Mapping[str, Mapping[str, Sequence[Answer]]]):
        self.cfg = cfg
        self.suites: dict[str, list[Judged]] = {}
        for adapter, files in answers.items():
            for suite, found in files.items():
                self.suites.setdefault(suite, []).extend(Judged(adapter, a) for a in found)
        self._prompts = self._choose_prompts()
        self.calls = len(cfg.models) * sum(
            len(self._for(judged.answer)) for found in self.suites.values() for judged in found
        )
        if self.calls > cfg.max_calls:
            raise UserError(
                f"max_calls: {self.calls} calls are needed, more than {cfg.max_calls}; raise "
                "it, or take fewer answers or judges"
            )

    def _choose_prompts(self) -> dict[str, Prompts] | Prompts:
        if self.cfg.prompts is not None:
            return next(iter(read_judge_prompts(Path(self.cfg.prompts)).values()))
        prompts: dict[str, Prompts] = {}
        for path in self.cfg.questions:
            for name, found in read_judge_prompts(Path(path)).items():
                if prompts.setdefault(name, found) != found:
                    raise UserError(
                        f"questions: {path} has other judge prompts for {name} than a file before "
                        "it; which are meant?"
                    )
        for suite, answers in self.suites.items():
            for judged in answers:
                if judged.answer.id not in prompts:
                    raise UserError(
                        f"questions: no file has the question {judged.answer.id} of {suite}; "
                        "name its file, or give `prompts` for all"
                    )
        return prompts

    def _for(self, answer: Answer) -> Prompts:
        if self.cfg.prompts is not None:
            return self._prompts  # type: ignore[return-value]
        return self._prompts[answer.id]  # type: ignore[return-value]

    def run(self, folder: Path) -> None:
        """Say what it will cost at most, then ask every judge about every answer.

        Prompts that a judge refuses for good are kept in `judge_failed.jsonl`, and not asked again
        unless the config says `retry_failed`.

        Args:
            folder: The evaluation's.

        Raises:
            UserError: A judge cannot be asked, or refuses everything; the file is broken.
        """
        jobs = [
            (judged, metric, fill(template, judged.answer.question, judged.answer.answer))
            for found in self.suites.values()
            for judged in found
            for metric, template in self._for(judged.answer).items()
        ]
        prompts = [prompt for _, _, prompt in jobs]
        print_bound(self.cfg, prompts)
        failed = _read_failed(folder / FAILED)
        for model in self.cfg.models:
            refused = {} if self.cfg.retry_failed else failed.get(model, {})
            with Progress(total=len(prompts), unit="call", desc=model) as bar:
                replies = ask(
                    model,
                    prompts,
                    progress=bar.update,
                    top_logprobs=self.cfg.top_logprobs,
                    max_tokens=self.cfg.max_tokens,
                    max_connections=self.cfg.max_connections,
                    timeout=self.cfg.timeout,
                    refused=refused,
                )
            failed[model] = refused
            _write_failed(folder / FAILED, failed)
            _tell_failed(model, replies)
            _tell_unparsable(model, replies, self.cfg.max_tokens)
            tell_other_scale(model, [metric for _, metric, _ in jobs], replies)
            for (judged, metric, _), reply in zip(jobs, replies, strict=True):
                judged.replies.setdefault(model, {})[metric] = reply


def print_bound(
    cfg: DictConfig, prompts: Sequence[str], lacking: str = "price in judge.prices"
) -> None:
    """Print the number of calls and a bound of what they cost.

    A token is at least one byte of text, so a prompt has at most as many tokens as bytes (in
    English about a quarter); a chat format's own tokens come on top.

    Args:
        cfg: `models`, `max_tokens` and `prices` of the checked entry `judge`.
        prompts: What every judge is asked.
        lacking: What to give where there is no price, for the message.
    """
    console = Console(highlight=False, soft_wrap=True, markup=False)
    tokens_in = sum(len(prompt.encode()) for prompt in prompts)
    tokens_out = int(cfg.max_tokens) * len(prompts)
    for model in cfg.models:
        text = (
            f"Judge {model}: {len(prompts)} calls, at most {tokens_in:,} tokens of input (one a "
            f"byte) and {tokens_out:,} of output"
        )
        price = cfg.prices.get(model)
        if price is None:
            text += f"; no {lacking}, so no bound in dollars"
        else:
            dollars = (tokens_in * price[0] + tokens_out * price[1]) / 1e6
            text += f", at most ${dollars:.2f}"
        console.print(text)


def _read_failed(path: Path) -> dict[str, dict[str, str]]:
    """Reasons by judge and prompt."""
    found: dict[str, dict[str, str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            found.setdefault(row["judge"], {})[row["prompt"]] = row["reason"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: broken; delete it, and its prompts are asked again") from None
    return found


def _write_failed(path: Path, failed: Mapping[str, Mapping[str, str]]) -> None:
    rows = [
        {"judge": judge, "prompt": prompt, "reason": reason}
        for judge, prompts in failed.items()
        for prompt, reason in prompts.items()
    ]
    if rows:
        write_text(path, json_lines(rows, ensure_ascii=True))
    else:
        path.unlink(missing_ok=True)


def _tell_failed(model: str, replies: Sequence[Reply]) -> None:
    reasons = [reply.text for reply in replies if reply.kind == "failed"]
    if reasons:
        Console(highlight=False, soft_wrap=True, markup=False).print(
            f"Judge {model}: {len(reasons)} of {len(replies)} prompts were refused (content or "
            f"length) and are counted as failed, first: {reasons[0]}; judge.retry_failed=true asks "
            "them again"
        )


def _tell_unparsable(model: str, replies: Sequence[Reply], max_tokens: int) -> None:
    lost = [reply for reply in replies if reply.kind == "unparsable"]
    if lost:
        cut = sum(reply.cut for reply in lost)
        why = f"; {cut} were cut, raise judge.max_tokens ({max_tokens})" if cut else ""
        shown = " ".join(lost[0].text.split())
        Console(highlight=False, soft_wrap=True, markup=False).print(
            f"Judge {model}: {len(lost)} of {len(replies)} replies are neither a score nor CODE or "
            f"REFUSAL{why}; first: {shown[:80]!r}"
        )


def tell_other_scale(model: str, metrics: Sequence[str], replies: Sequence[Reply]) -> None:
    """A prompt that asks for 1 to 10 gives scores that all are below any threshold of 100."""
    for name in dict.fromkeys(metrics):
        scores = [r.score for m, r in zip(metrics, replies, strict=True) if m == name and r.usable]
        found = [score for score in scores if score is not None]
        if len(found) >= _FEW and max(found) <= _OTHER_SCALE:
            Console(highlight=False, soft_wrap=True, markup=False).print(
                f"Judge {model}: all {len(found)} scores of {name} are at most {_OTHER_SCALE}; a "
                "score is from 0 to 100 here: does its prompt ask for that?"
            )


def judge_lines(judged: Sequence[Judged]) -> Iterator[dict[str, Any]]:
    """A line an answer for `scores/judge_<suite>.jsonl`."""
    for one in judged:
        yield {
            "adapter": one.adapter,
            "id": one.answer.id,
            "category": one.answer.category or "",
            "paraphrase": one.answer.paraphrase,
            "sample": one.answer.sample,
            "question": one.answer.question,
            "answer": one.answer.answer,
            "judges": {
                judge: {
                    metric: {
                        "score": reply.score,
                        "kind": reply.kind,
                        "reply": reply.text,
                        "from": "logprobs" if reply.expected else "text",
                        **({"cut": True} if reply.cut else {}),
                    }
                    for metric, reply in replies.items()
                }
                for judge, replies in one.replies.items()
            },
        }
