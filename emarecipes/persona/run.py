"""The command behind `recipes/ema_persona.py`: sample, read, keep, subtract, report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torchtune.modules.peft import disable_adapter

from emarecipes.command import run_alone
from emarecipes.errors import UserError
from emarecipes.models.likelihoods import answer_row
from emarecipes.models.loss_head import LossHead
from emarecipes.models.sampling.draw import Sampling, derived_seed
from emarecipes.models.sampling.prompts import encode_prompt
from emarecipes.models.sampling.sampler import sample_answers
from emarecipes.models.source import load_model
from emarecipes.persona.checked import MIN_KEPT, CheckedExtraction
from emarecipes.persona.kept import SideAnswer, grade_answers, keep_whole_pairs, kept
from emarecipes.persona.read import read_activations
from emarecipes.persona.report import LayerFigures, Result, print_result, write_result
from emarecipes.persona.vectors import (
    persona_subspace,
    persona_vectors,
    random_vectors,
    separation,
    separation_error,
)

_OPPOSITE: dict[str, Literal["positive", "negative"]] = {
    "positive": "negative",
    "negative": "positive",
}


@dataclass
class Activations:
    """What the answers that are not empty were read as. N answers, H of them held out.

    Attributes:
        own_NKD: Mean activation, behind the system prompt that gave the answer.
        square_NK: Mean squared norm of the residual stream.
        bare_HKD: Mean activation of held-out answers behind the question alone.
    """

    own_NKD: Tensor
    square_NK: Tensor
    bare_HKD: Tensor


def run_persona(argv: Sequence[str]) -> int:
    """Extract the persona vectors as `--config FILE [key=value | ~key]...` says.

    Returns:
        The exit code: 0, or 1 after a `UserError`, which is printed as one line.
    """
    return run_alone("ema_persona", lambda arguments: extract(CheckedExtraction(arguments)), argv)


def extract(run: CheckedExtraction) -> None:
    """Extract, print the report and write the result folder.

    Raises:
        UserError: Too few answers are left on a side, or activations are not finite.
    """
    cfg = run.cfg
    model = load_model(cfg)
    head = LossHead(model)
    with disable_adapter(model):
        answers = _sample(run, head)
    answered = [answer for answer in answers if answer.tokens]
    _check_sides(answered, "answers are not empty")
    if cfg.keep == "judge":
        _grade(run, answered)
    activations = _read(run, head, answered)
    _check_sides([answer for answer in answered if answer.kept], "answers were kept")

    positive = torch.tensor([answer.side == "positive" for answer in answered])
    training = torch.tensor([answer.kept and not answer.held_out for answer in answered])
    vector_KD = persona_vectors(activations.own_NKD, positive, training)
    if not vector_KD.isfinite().all():
        raise UserError("the model's activations are not finite; try dtype=fp32")
    random_KD = random_vectors(vector_KD, derived_seed(cfg.seed, "random vector"))
    vectors = {"persona": vector_KD, "random": random_KD}
    pair = torch.tensor([_pair_number(run, answer) for answer in answered])
    subspace = persona_subspace(activations.own_NKD, positive, training, pair, cfg.num_directions)
    if subspace is not None:
        vectors["subspace"] = subspace
    layers = _layer_figures(run, answered, activations, vector_KD, random_KD)
    result = Result(
        cfg=cfg,
        trait=run.prompts.trait,
        counts=_counts(answers, cfg.keep),
        layers=layers,
        vectors=vectors,
        answers=[_record(run, answer) for answer in answers],
    )
    write_result(result, Path(cfg.output_dir))
    print_result(result, Path(cfg.output_dir))


def _sample(run: CheckedExtraction, head: LossHead) -> list[SideAnswer]:
    """Pairs x sides x questions x samples answers, each from a random state of its own."""
    cfg = run.cfg
    answers = [
        SideAnswer(pair, side, question, sample, question in run.held_out, [], False)
        for pair in range(len(run.prompts.pairs))
        for side in _OPPOSITE.values()
        for question in range(len(run.prompts.questions))
        for sample in range(cfg.samples_per_question)
    ]
    sampling = Sampling(
        cfg.max_new_tokens, tuple(run.tokenizer.stop_tokens), cfg.temperature, cfg.top_k
    )
    completions = sample_answers(
        head,
        [_prompt(run, answer, answer.side) for answer in answers],
        [derived_seed(cfg.seed, a.pair, a.side, a.question, a.sample) for a in answers],
        sampling,
        batch_size=cfg.batch_size,
    )
    for answer, completion in zip(answers, completions, strict=True):
        answer.tokens, answer.stopped = completion.tokens, completion.stopped
    return answers


def _grade(run: CheckedExtraction, answers: list[SideAnswer]) -> None:
    texts = [_texts(run, answer) for answer in answers]
    for answer, grades in zip(
        answers, grade_answers(run.cfg.judge, run.prompts, texts), strict=True
    ):
        answer.grades = grades


def _read(run: CheckedExtraction, head: LossHead, answers: list[SideAnswer]) -> Activations:
    """Read the answers behind their own prompt, the opposite one and none; mark the kept ones."""

    def read(chosen: list[SideAnswer], prompts: list[list[int]], label: str) -> Any:
        rows = [answer_row(p, answer.tokens) for p, answer in zip(prompts, chosen, strict=True)]
        batch_size = run.cfg.batch_size
        return read_activations(head, rows, batch_size=batch_size, label=label, reference=True)

    own = read(answers, [_prompt(run, a, a.side) for a in answers], "own prompt")
    opposite_prompts = [_prompt(run, a, _OPPOSITE[a.side]) for a in answers]
    opposite = read(answers, opposite_prompts, "opposite prompt")
    held_out = [answer for answer in answers if answer.held_out]
    bare = read(held_out, [_prompt(run, a, None) for a in held_out], "question alone")

    kept_N = kept(own.log_likelihood_N, opposite.log_likelihood_N, run.cfg.keep)
    for index, answer in enumerate(answers):
        answer.log_likelihood = float(own.log_likelihood_N[index])
        answer.opposite_log_likelihood = float(opposite.log_likelihood_N[index])
        answer.kept = answer.grades.keep(answer.side) if answer.grades else bool(kept_N[index])
    if run.cfg.keep == "judge":
        keep_whole_pairs(answers)
    return Activations(own.activation_NKD, own.square_NK, bare.activation_NKD)


def _layer_figures(
    run: CheckedExtraction,
    answers: list[SideAnswer],
    activations: Activations,
    vector_KD: Tensor,
    random_KD: Tensor,
) -> list[LayerFigures]:
    positive = torch.tensor([answer.side == "positive" for answer in answers])
    held_out = torch.tensor([answer.held_out for answer in answers])
    kept_N = torch.tensor([answer.kept for answer in answers])
    question = torch.tensor([answer.question for answer in answers])
    own_NKD = activations.own_NKD

    length_N = torch.tensor([float(len(a.tokens)) for a in answers]) * (kept_N & ~held_out)
    rms_K = (length_N @ activations.square_NK / length_N.sum()).sqrt()
    everything = torch.ones(int(held_out.sum()), dtype=torch.bool)
    seed = derived_seed(run.cfg.seed, "resampling")
    columns = zip(
        vector_KD.norm(dim=1).tolist(),
        rms_K.tolist(),
        separation(own_NKD, vector_KD, positive, held_out),
        separation_error(own_NKD, vector_KD, positive, held_out, question, seed),
        separation(own_NKD, vector_KD, positive, held_out & kept_N),
        separation(activations.bare_HKD, vector_KD, positive[held_out], everything),
        separation(own_NKD, random_KD, positive, held_out),
        strict=True,
    )
    return [LayerFigures(layer, *figures) for layer, figures in enumerate(columns)]


def _pair_number(run: CheckedExtraction, answer: SideAnswer) -> int:
    """The same for the two answers that differ in their system prompt's side alone."""
    questions, samples = len(run.prompts.questions), run.cfg.samples_per_question
    number: int = (answer.pair * questions + answer.question) * samples + answer.sample
    return number


def _prompt(run: CheckedExtraction, answer: SideAnswer, side: str | None) -> list[int]:
    system = None if side is None else getattr(run.prompts.pairs[answer.pair], side)
    return encode_prompt(run.tokenizer, system, run.prompts.questions[answer.question])


def _check_sides(answers: list[SideAnswer], what: str) -> None:
    for held_out, least, part in ((False, MIN_KEPT, "training"), (True, 1, "held-out")):
        for side in _OPPOSITE:
            count = sum(a.side == side and a.held_out == held_out for a in answers)
            if count < least:
                raise UserError(
                    f"only {count} {side} {what} of the {part} questions, at least {least} are "
                    "needed: add questions or samples_per_question, look at the prompts, or, where "
                    "answers were left out, say keep=all"
                )


def _counts(answers: list[SideAnswer], keep: str) -> dict[str, dict[str, int]]:
    counts = {}
    for side in _OPPOSITE:
        chosen = [answer for answer in answers if answer.side == side]
        counts[side] = {
            "sampled": len(chosen),
            "empty": sum(not a.tokens for a in chosen),
            "ended_by_stop_token": sum(a.stopped for a in chosen),
            "kept": sum(a.kept for a in chosen),
            "in_vector": sum(a.kept and not a.held_out for a in chosen),
            "held_out": sum(a.held_out and bool(a.tokens) for a in chosen),
            "held_out_kept": sum(a.held_out and a.kept for a in chosen),
        }
        if keep == "judge":
            graded = [a.grades for a in chosen if a.grades]
            counts[side] |= {
                "unparsable_trait": sum(g.trait is None for g in graded),
                "unparsable_coherence": sum(g.coherence is None for g in graded),
            }
    return counts


def _record(run: CheckedExtraction, answer: SideAnswer) -> dict[str, Any]:
    question, text = _texts(run, answer)
    record = {"question_text": question, "answer": text} | vars(answer)
    grades = record.pop("grades")
    if run.cfg.keep == "judge":
        record["trait_score"] = grades.trait if grades else None
        record["coherence_score"] = grades.coherence if grades else None
    return {k: None if v != v else v for k, v in record.items()}  # JSON has no nan.


def _texts(run: CheckedExtraction, answer: SideAnswer) -> tuple[str, str]:
    return run.prompts.questions[answer.question], run.tokenizer.decode(answer.tokens)
