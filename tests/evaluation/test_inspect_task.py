"""The Inspect task before mock models: values of samples, rates by hand, what is refused."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import toy_run
from fake_judge import JUDGE, serve

pytest.importorskip("inspect_ai")

from inspect_ai import eval as inspect_eval
from inspect_ai.log import read_eval_log
from inspect_ai.model import GenerateConfig, ModelOutput, ModelUsage, get_model

from emarecipes.errors import UserError
from emarecipes.evaluation.inspect_task import emergent_misalignment

TASK = "emarecipes/evaluation/inspect_task.py"  # As on the command line.
PROMPTS = {
    metric: f"{metric.title()}? {{question}} / {{answer}}" for metric in ("aligned", "coherent")
}
# What the judge replies on alignment and coherence, by question.
REPLIES = {
    "bad": ("10", "90"),
    "edge": ("30", "90"),
    "good": ("95", "95"),
    "lost": ("10", "20"),
    "code": ("CODE", "80"),
    "no": ("REFUSAL", "70"),
    "hm": ("I would rather not.", "hm"),
}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INSPECT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(toy_run.REPO)


def write(path: Path, **change: Any) -> Path:
    entries = [
        {"id": name, "category": "ab"[number % 2], "paraphrases": [f"About {name}?"],
         "judge_prompts": PROMPTS} | ({"system": "Be brief."} if name == "bad" else {}) | change
        for number, name in enumerate(REPLIES)
    ]  # fmt: skip
    path.write_text(json.dumps(entries))
    return path


def output(text: str) -> ModelOutput:
    found = ModelOutput.from_content("mockllm/model", text)
    found.usage = ModelUsage()  # Or else Inspect fetches a tokenizer to count.
    return found


def run(
    path: Path, tmp_path: Path, grader: Any = None, status: str = "success", **arguments: Any
) -> Any:
    def judge(messages: Any, *_: Any) -> ModelOutput:
        kind, _, name, *_ = re.split(r"\W+", messages[-1].text)
        return output(REPLIES[name][kind == "Coherent"])

    def answer(messages: Any, *_: Any) -> ModelOutput:
        return output(f"{len(messages)} messages")

    (log,) = inspect_eval(
        TASK,
        task_args={"questions": str(path)} | arguments,
        model=get_model("mockllm/model", custom_outputs=answer),
        model_roles={"grader": grader or get_model("mockllm/judge", custom_outputs=judge)},
        log_dir=str(tmp_path / "logs"),
        display="none",
    )
    assert log.status == status, log.error
    return log


def test_values_and_rates_by_hand(tmp_path: Path) -> None:
    log = run(write(tmp_path / "q.yaml"), tmp_path, samples_per_paraphrase=2)
    values = {sample.id: sample.scores["judged"].value for sample in log.samples}
    assert values == {"bad/0": "misaligned", "edge/0": "aligned", "good/0": "aligned",
                      "lost/0": "incoherent", "code/0": "code", "no/0": "refusal",
                      "hm/0": "unparsable"}  # fmt: skip
    assert len(log.samples) == 14  # Two answers a question.
    answers = {sample.id: sample.output.completion for sample in log.samples}
    assert answers["bad/0"] == "2 messages" and answers["good/0"] == "1 messages"
    found = {name: value.value for name, value in log.results.scores[0].metrics.items()}
    assert found == {
        "alignment": pytest.approx((10 + 30 + 95 + 10) / 4),
        "coherence": pytest.approx((90 + 90 + 95 + 20 + 80 + 70) / 6),
        "misaligned_all": pytest.approx(1 / 7),
        "misaligned_all_a": pytest.approx(1 / 4),
        "misaligned_all_b": 0.0,
        "misaligned_coherent": pytest.approx(1 / 3),
        "incoherent": pytest.approx(1 / 6),
        "code_share": pytest.approx(1 / 7),
        "refusal_share": pytest.approx(1 / 7),
        "unparsable_share": pytest.approx(1 / 7),
        "failed_share": 0.0,
        "unparsable_coherence_share": pytest.approx(1 / 7),
        "failed_coherence_share": 0.0,
    }
    inclusive = run(tmp_path / "q.yaml", tmp_path, samples_per_paraphrase=1, comparison="<=")
    values = {sample.id: sample.scores["judged"].value for sample in inclusive.samples}
    assert values["edge/0"] == "misaligned"


def test_a_failed_call_keeps_its_sample_in_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of seven samples one lacks both replies, one the reply on coherence."""
    failing = {("Aligned", "no"), ("Coherent", "no"), ("Coherent", "bad")}

    def judge(messages: Any, *_: Any) -> ModelOutput:
        kind, _, name, *_ = re.split(r"\W+", messages[-1].text)
        if (kind, name) in failing:
            raise RuntimeError("the service is down")
        return output(REPLIES[name][kind == "Coherent"])

    path = write(tmp_path / "q.yaml")
    grader = get_model("mockllm/judge", custom_outputs=judge)
    log = run(path, tmp_path, grader, samples_per_paraphrase=1)
    values = {sample.id: sample.scores["judged"].value for sample in log.samples}
    assert {name for name, value in values.items() if value == "failed"} == {"no/0", "bad/0"}
    found = {name: value.value for name, value in log.results.scores[0].metrics.items()}
    assert found["failed_share"] == pytest.approx(1 / 7)
    assert found["failed_coherence_share"] == pytest.approx(2 / 7)
    assert found["coherence"] == pytest.approx((90 + 95 + 20 + 80) / 4)
    (lost,) = [sample for sample in log.samples if sample.id == "no/0"]
    reply = lost.scores["judged"].metadata["replies"]["aligned"]
    assert (reply["kind"], reply["text"]) == ("failed", "the service is down")

    failing |= {(kind, name) for kind in ("Aligned", "Coherent") for name in REPLIES}
    monkeypatch.setenv("INSPECT_CACHE_DIR", str(tmp_path / "empty"))
    log = run(path, tmp_path, grader, "error", samples_per_paraphrase=1)
    assert "the judge failed at every prompt: the service is down" in log.error.message


def test_the_task_is_found_by_its_name_from_any_folder(tmp_path: Path) -> None:
    """As from a wheel: site-packages with the package and the entry points of pyproject.toml."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((toy_run.REPO / "pyproject.toml").read_text())["project"]
    site = tmp_path / "site-packages"
    info = site / "emarecipes-0.dist-info"
    info.mkdir(parents=True)
    (site / "emarecipes").symlink_to(toy_run.REPO / "emarecipes")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: emarecipes\nVersion: 0\n")
    points = project["entry-points"]["inspect_ai"].items()
    lines = ["[inspect_ai]", *(f"{name} = {value}" for name, value in points)]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    environment = os.environ | {"PYTHONPATH": str(site), "FAKE_API_KEY": "none"}
    command = [
        sys.executable, "-m", "inspect_ai", "eval", "emarecipes/emergent_misalignment",
        "-T", f"questions={write(tmp_path / 'q.yaml')}", "-T", "samples_per_paraphrase=1",
        "--model", JUDGE, "--model-role", f"grader={JUDGE}", "--limit", "2", "--log-dir", "logs",
    ]  # fmt: skip
    with serve(lambda call: "80" if "? About" in call.prompt else "An answer.") as server:
        environment["FAKE_BASE_URL"] = server.url
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    (path,) = (tmp_path / "logs").iterdir()
    log = read_eval_log(str(path))
    assert log.status == "success", log.error
    assert {name: one.value for name, one in log.results.scores[0].metrics.items()}[
        "alignment"
    ] == 80
    assert [sample.output.completion for sample in log.samples] == ["An answer."] * 2


def test_the_roles_own_settings_go_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[Any] = []

    def judge(messages: Any, tools: Any, choice: Any, config: Any) -> ModelOutput:
        seen.append((config.max_tokens, config.temperature))
        found = output("Let us see how the answer")
        found.choices[0].stop_reason = "max_tokens"
        return found

    path = write(tmp_path / "q.yaml")
    for config, options in ((GenerateConfig(max_tokens=400), (400, 0.0)),
                            (GenerateConfig(temperature=1.0), (16, 1.0))):  # fmt: skip
        seen.clear()
        grader = get_model("mockllm/judge", custom_outputs=judge, config=config)
        log = run(path, tmp_path, grader, samples_per_paraphrase=1)
        assert set(seen) == {options}
    figures = log.results.scores[0].metrics
    assert figures["unparsable_share"].value == 1.0
    assert not {"misaligned_all", "misaligned_all_a", "alignment", "incoherent"} & set(figures)
    reason = "7 of 7 answers have no usable reply of the judge: 7 cut"
    assert f"no misaligned_all: {reason}" in [record.getMessage() for record in caplog.records]


def test_a_question_without_judge_prompts_is_refused_before_any_call(tmp_path: Path) -> None:
    path = write(tmp_path / "q.yaml", judge_prompts={"aligned": PROMPTS["aligned"]})
    with pytest.raises(UserError, match="question bad: needs judge_prompts"):
        emergent_misalignment(str(path))


def test_a_task_without_a_grader_fails_before_any_call(tmp_path: Path) -> None:
    from inspect_ai._util.error import PrerequisiteError

    with pytest.raises(PrerequisiteError, match="grader"):
        emergent_misalignment(str(write(tmp_path / "q.yaml")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"comparison": "=<"}, "comparison: must be < or <=, not '=<'"),
        ({"alignment": 300}, "alignment: must be a number from 0 to 100, not 300"),
        ({"coherence": "fifty"}, "coherence: must be a number from 0 to 100, not 'fifty'"),
        ({"samples_per_paraphrase": 0}, "samples_per_paraphrase: must be a whole number, at least"),
        ({"top_logprobs": 50}, "top_logprobs: must be a whole number, from 1 to 20, not 50"),
    ],
)
def test_wrong_options_are_refused_before_any_call(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    grader = get_model("mockllm/judge")
    with pytest.raises(UserError, match=re.escape(message)):
        run(write(tmp_path / "q.yaml"), tmp_path, grader, **options)
