"""Judges and prompts that are wrong: told before weights and calls."""

import json
from pathlib import Path
from typing import Any

import pytest
import toy_run
from fake_judge import JUDGE
from omegaconf import OmegaConf
from toy_judged import ALIGNED, COHERENT, write_config

from emarecipes.errors import UserError
from emarecipes.evaluation.answers import Answer
from emarecipes.evaluation.judging import Judgement, read_judge_prompts, tell_other_scale
from emarecipes.evaluation.run import run_eval
from emarecipes.judges.reply import Reply

pytest.importorskip("inspect_ai")
pytest.importorskip("openai")

pytestmark = pytest.mark.usefixtures("judge_client")


@pytest.mark.parametrize(
    ("judge", "reason"),
    [
        ({"max_calls": 5}, "judge: max_calls: 6 calls are needed, more than 5"),
        ({"models": ["nobody/model"]}, "judge.models: the judge nobody/model cannot be used"),
        ({"models": ["openai-api/keyless/x"]}, "KEYLESS_API_KEY"),
        ({"models": [JUDGE, JUDGE]}, "judge.models: a judge is named twice"),
        ({"questions": ["none.yaml"]}, "judge.questions: no such file: none.yaml"),
        ({"questions": ["OTHER"]}, "no file has the question q0 of free"),
        ({"questions": ["LACKING"]}, "question q0: needs judge_prompts with aligned and coherent"),
        (
            {"questions": ["BLANK"]},
            "question x: coherent needs the placeholders {question}",
        ),
        ({"timeout": 0}, "judge.timeout: input should be greater than or equal to 1"),
        ({"prices": {"x": [1.0, 1.0]}}, "judge.prices: x is not among the judges"),
        ({"top_logprob": 5}, "judge.top_logprob: unknown key (did you mean top_logprobs?)"),
        ({"comparison": ">"}, "judge.comparison: input should be '<' or '<='"),
    ],
)
def test_a_wrong_judge_is_refused_before_weights_and_calls(
    toy_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    judge: dict[str, Any],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FAKE_BASE_URL", "http://127.0.0.1:9/v1")
    lacking = {"id": "q0", "paraphrases": ["?"], "judge_prompts": {"aligned": ALIGNED}}
    whole = {"id": "x", "judge_prompts": {"aligned": ALIGNED, "coherent": COHERENT}}
    Path("OTHER").write_text(json.dumps([lacking | whole]))
    Path("LACKING").write_text(json.dumps([lacking]))
    Path("BLANK").write_text(
        json.dumps(
            [lacking | whole | {"judge_prompts": {"aligned": ALIGNED, "coherent": "Coherent?"}}]
        )
    )
    config = write_config(toy_model_dir, tmp_path, judge)
    assert run_eval(["--config", str(config)]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1 and reason in errors[0], errors
    assert not (tmp_path / "out").exists()


def test_two_files_with_other_prompts_for_one_question(tmp_path: Path) -> None:
    """The last one's would be taken for the answers to both."""
    entry = {"id": "q0", "paraphrases": ["?"]}
    files = []
    for name, coherent in (("one", COHERENT), ("two", COHERENT), ("other", f"{COHERENT} Now?")):
        prompts = {"aligned": ALIGNED, "coherent": coherent}
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps([entry | {"judge_prompts": prompts}]))
    cfg = OmegaConf.create({"models": [JUDGE], "prompts": None, "max_calls": 9})
    answers = {"one": {"free": [Answer(id="q0", paraphrase=0, sample=0, question="?",
                                       answer="!", stop="end")]}}  # fmt: skip
    cfg.questions = [str(path) for path in files[:2]]
    assert Judgement(cfg, answers).calls == 2
    cfg.questions = [str(path) for path in files]
    with pytest.raises(UserError, match=r"other.json has other judge prompts for q0"):
        Judgement(cfg, answers)


def test_a_prompt_that_asks_for_another_scale_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    def tell(*scores: float | None) -> str:
        kinds: Any = ["unparsable" if score is None else "score" for score in scores]
        replies = [Reply(kind, score, "") for kind, score in zip(kinds, scores, strict=True)]
        tell_other_scale("j", ["aligned"] * len(replies), replies)
        return capsys.readouterr().out

    expected = "Judge j: all 10 scores of aligned are at most 10"
    assert expected in tell(*range(1, 11), None)
    assert tell(*range(1, 10), 55, 3) == "" and tell(1, 2, 3) == ""


def test_shipped_question_files_have_judge_prompts() -> None:
    for path in sorted((toy_run.REPO / "data/questions").glob("*.yaml")):
        prompts = read_judge_prompts(path)
        assert len(prompts) >= 30
        assert {"aligned", "coherent"} <= set(next(iter(prompts.values())))
