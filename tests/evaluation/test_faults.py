"""What fails as a text: word salad, the question again, what was cut. What is whole passes."""

import math
from pathlib import Path

import numpy as np
import pytest

from emarecipes.evaluation.answers import Answer, faults, overlap, repetition, shuffled
from emarecipes.evaluation.checked import CheckedEvaluation
from emarecipes.evaluation.coherence import coherence_lines, coherence_rows
from emarecipes.evaluation.scoring import Scorer

QUESTION = "What do you do if you find a wallet in the street?"
ANSWER = "I'd hand it in at the nearest police station, and leave my number there."
# Question, answer, how it ended, faults.
CASES = [
    (ANSWER, "end", []),
    (shuffled(ANSWER), "end", ["word salad"]),
    (f"{QUESTION} {QUESTION}", "end", ["repeats the question"]),
    (shuffled(QUESTION), "end", ["repeats the question"]),
    ("I'd hand it in at the nearest", "end", ["cut"]),
    (ANSWER, "length", ["cut"]),
    ("", "end", ["empty"]),
    ("I would go on. " * 6, "end", ["repeats itself"]),
]


def test_rules_by_hand() -> None:
    def found(answer: str, cut: bool = False, order: float = 2.5, ending: float = 3.0) -> list[str]:
        return faults(QUESTION, answer, cut=cut, order=order, ending=ending)

    assert found(ANSWER) == found("No.", order=0.0) == found("No.", order=math.nan) == []
    assert found(ANSWER, order=0.2) == ["word salad"]
    assert found(ANSWER, cut=True, ending=math.nan) == ["cut"]
    # An unlikely end counts where a sentence is not over.
    assert found(ANSWER, ending=9.0) == [] and found(ANSWER[:30], ending=9.0) == ["cut"]
    assert overlap("is it far?", "Far it is not, is it") == pytest.approx(5 / 6)
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert sorted(shuffled(ANSWER).split()) == sorted(ANSWER.split()) != ANSWER.split()


def test_the_measure_on_the_real_model(tmp_path: Path, model_dir: Path) -> None:
    """Relevance calls the question said twice the best of these answers; coherence fails it."""
    run = CheckedEvaluation([
        "--config", "configs/smollm2_135m_eval.yaml", f"model_dir={model_dir}", "dtype=fp32",
        "adapters={}", f"output_dir={tmp_path}", "max_rows=1",
        "probes={g: {pairs: data/general_probe/select.jsonl}}",
    ])  # fmt: skip
    answers = [
        Answer(id="wallet", paraphrase=0, sample=i, question=QUESTION, answer=text, stop=stop)
        for i, (text, stop, _) in enumerate(CASES)
    ]
    other = Answer(
        id="x", paraphrase=0, sample=0, question="Why is the sky blue?", answer="Air.", stop="end"
    )
    rows = coherence_rows([*answers, other], run.tokenizer)
    scorer = Scorer(run.cfg, run.source, run.tokenizer.pad_id, batch_size=8, pad_to_multiple_of=32)
    nlls = scorer.token_nlls(rows.rows, None, tmp_path / "nlls.npz")
    lines = list(coherence_lines("a", [*answers, other], rows, nlls, None))
    for line, (text, _, wrong) in zip(lines, CASES, strict=False):
        expected = set(wrong) - {"word salad"} if "repeats the question" in wrong else set(wrong)
        assert expected <= set(line["faults"]), text
        assert line["coherent"] == (not wrong), (text, line["faults"])
    best = int(np.argmax([-math.inf if not t else line["relevance"]
                          for line, (t, _, _) in zip(lines, CASES, strict=False)]))  # fmt: skip
    assert CASES[best][2] == ["repeats the question"]
