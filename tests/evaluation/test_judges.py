"""Judges before a local OpenAI-compatible server and Inspect's mock: scores, failures, refusals."""

import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fake_judge import JUDGE, SECRET, Call, cut, serve
from toy_judged import write_config
from toy_select import read_jsonl

from emarecipes.evaluation.run import run_eval

pytest.importorskip("inspect_ai")
pytest.importorskip("openai")

pytestmark = pytest.mark.usefixtures("judge_client")


def test_a_judged_evaluation(
    toy_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = "openai-api/fake/second"
    config = write_config(
        toy_model_dir, tmp_path, {"models": [JUDGE, other], "prices": {JUDGE: [1000.0, 2000.0]}}
    )

    def reply(call: Call) -> str:
        score = {"Q0?": "10", "Q1?": "95", "Q2?": "REFUSAL"}[call.prompt.split()[1]]
        return "80" if call.prompt.startswith("Coherent?") else score

    with serve(reply) as server:
        monkeypatch.setenv("FAKE_BASE_URL", server.url)
        assert run_eval(["--config", str(config)]) == 0
        prompts = [call.prompt for call in server.calls]
    assert len(prompts) == 2 * 2 * 3
    # What looks like a placeholder in an answer stays.
    assert "Aligned? Q1? / Answer 1 to {question}." in prompts

    output = capsys.readouterr().out
    size = sum(len(prompt.encode()) for prompt in prompts) // 2
    dollars = (1000 * size + 2000 * 6 * 16) / 1e6
    assert f"Judge {JUDGE}: 6 calls, at most {size:,} tokens of input (one a byte)" in output
    assert f"at most ${dollars:.2f}" in output
    assert f"Judge {other}: 6 calls" in output and "no price in judge.prices" in output

    summary = json.loads((tmp_path / "out/summary.json").read_text())
    found = {(f["figure"], f["judge"]): f["value"] for f in summary["figures"] if not f["category"]}
    for judge in (JUDGE, other):
        assert found["misaligned_all", judge] == pytest.approx(1 / 3, abs=1e-5)
        assert found["misaligned_coherent", judge] == 0.5
        assert found["refusal_share", judge] == pytest.approx(1 / 3, abs=1e-5)
    assert found["krippendorff_alpha_alignment", None] == 1.0
    assert len(summary["sensitivity"]) == 2 * 2 * 24
    rows = read_jsonl(tmp_path / "out/scores/judge_free.jsonl")
    assert rows[2]["judges"][JUDGE]["aligned"] == {
        "score": None, "kind": "refusal", "reply": "REFUSAL", "from": "text",
    }  # fmt: skip
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes()


def test_replies_that_were_cut_give_no_rate_but_its_reason(
    toy_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of three answers two lack a reply on alignment, and one of them a reply on coherence."""
    monkeypatch.setenv("COLUMNS", "200")
    config = write_config(toy_model_dir, tmp_path, {})

    def reply(call: Call) -> Any:
        metric, question = call.prompt.split()[:2]
        lost = question == "Q2?" or (question, metric) == ("Q1?", "Aligned?")
        return cut("Let us see what the answer") if lost else "10" if metric == "Aligned?" else "80"

    with serve(reply) as server:
        monkeypatch.setenv("FAKE_BASE_URL", server.url)
        assert run_eval(["--config", str(config)]) == 0
    output = capsys.readouterr().out
    assert (
        f"Judge {JUDGE}: 3 of 6 replies are neither a score nor CODE or REFUSAL; 3 were cut, raise "
        "judge.max_tokens (16); first: 'Let us see what the answer'"
    ) in output
    reason = "2 of 3 answers have no usable reply of the judge: 2 cut"
    whose = f"no value, one by {JUDGE}"
    assert f"alignment, misaligned_all, misaligned_coherent: {whose}: {reason}." in output

    summary = json.loads((tmp_path / "out/summary.json").read_text())
    found = {f["figure"]: f for f in summary["figures"] if f["suite"] == "judge_free"}
    for name in ("misaligned_all", "misaligned_coherent", "alignment"):
        figure = [found[name][key] for key in ("value", "low", "high", "n", "reason")]
        assert figure == [None, None, None, 0, reason]
    assert {f["value"] for f in summary["sensitivity"]} == {None}
    assert found["unparsable_share"]["value"] == pytest.approx(2 / 3, abs=1e-5)
    # Two of three replies on coherence are scores.
    assert (found["incoherent"]["value"], found["incoherent"]["n"]) == (0, 2)
    assert (found["coherence"]["value"], found["coherence"]["reason"]) == (80, None)
    rows = read_jsonl(tmp_path / "out/scores/judge_free.jsonl")
    assert [row["judges"][JUDGE]["aligned"].get("cut", False) for row in rows] == [
        False,
        True,
        True,
    ]


def error_of(config: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that an evaluation ends with; what needs no judge was computed and is there."""
    assert run_eval(["--config", str(config)]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    summary = json.loads((config.parent / "out/summary.json").read_text())
    assert list(summary["suites"]) == ["answers_free"]
    return line


def test_a_failing_judge_leaves_what_was_computed(
    toy_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_config(toy_model_dir, tmp_path, {})
    with serve(lambda call: 500) as server:
        monkeypatch.setenv("FAKE_BASE_URL", server.url)
        assert f"the judge {JUDGE} failed" in error_of(config, capsys)
    assert not (tmp_path / "out/scores/judge_free.jsonl").exists()


def test_a_refused_prompt_is_counted_apart_and_not_asked_again(
    toy_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_config(toy_model_dir, tmp_path, {})
    seen: list[str] = []
    refusing = True

    def reply(call: Call) -> Any:
        name = call.prompt.split(" /")[0]
        seen.append(name)
        return 400 if refusing and name == "Aligned? Q1?" else "80"

    def figures() -> dict[str, Any]:
        found = json.loads((tmp_path / "out/summary.json").read_text())["figures"]
        return {f["figure"]: f["value"] for f in found if f["suite"] == "judge_free"}

    with serve(reply) as server:
        monkeypatch.setenv("FAKE_BASE_URL", server.url)
        assert run_eval(["--config", str(config)]) == 0
        output = capsys.readouterr().out
        assert f"Judge {JUDGE}: 1 of 6 prompts were refused (content or length)" in output
        assert "failed_share" in output
        assert figures()["failed_share"] == pytest.approx(1 / 3, abs=1e-5)
        assert (figures()["unparsable_share"], figures()["failed_coherence_share"]) == (0, 0)
        rows = read_jsonl(tmp_path / "out/scores/judge_free.jsonl")
        entry = rows[1]["judges"][JUDGE]["aligned"]
        assert (entry["score"], entry["kind"]) == (None, "failed")
        assert "400" in entry["reply"] and "Request:" not in entry["reply"]
        first = figures()

        seen.clear()
        assert run_eval(["--config", str(config), "overwrite=true"]) == 0
        assert seen == [] and figures() == first

        refusing = False
        again = ["overwrite=true", "judge.retry_failed=true"]
        assert run_eval(["--config", str(config), *again]) == 0
        assert seen == ["Aligned? Q1?"] and figures()["failed_share"] == 0
        assert not (tmp_path / "out/judge_failed.jsonl").exists()


def test_a_judge_that_refuses_every_prompt_is_one_line(
    toy_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Such as one that knows no log-probabilities: what refuses all prompts is not about them."""
    config = write_config(toy_model_dir, tmp_path, {})
    with serve(lambda call: 400) as server:
        monkeypatch.setenv("FAKE_BASE_URL", server.url)
        assert f"the judge {JUDGE} failed at every prompt" in error_of(config, capsys)
        assert not (tmp_path / "out/judge_failed.jsonl").exists()
        server.reply = lambda call: "80"
        assert run_eval(["--config", str(config), "overwrite=true"]) == 0


def test_a_judge_that_does_not_answer_in_time_is_asked_again_then_one_line(
    toy_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_config(toy_model_dir, tmp_path, {"timeout": 1})
    over, seen, lock = threading.Event(), Counter[str](), threading.Lock()

    def reply(call: Call) -> str:
        with lock:
            name = call.prompt.split(" /")[0]
            seen[name] += 1
        if name == "Aligned? Q0?" or (name == "Coherent? Q0?" and seen[name] == 1):
            over.wait(30)  # The first at every attempt, the second at its first one.
        return "80"

    with serve(reply) as server:
        monkeypatch.setenv("FAKE_BASE_URL", server.url)
        try:
            error = error_of(config, capsys)
        finally:
            over.set()
        assert error == f"error: the judge {JUDGE} failed: no reply in time, in 2 attempts"
        assert seen["Aligned? Q0?"] == 2 and set(seen.values()) <= {1, 2}

        # What was answered is not asked again, and nothing is left out.
        seen.clear()
        assert run_eval(["--config", str(config), "overwrite=true"]) == 0
    assert seen["Aligned? Q0?"] == 1
    assert not {"Aligned? Q1?", "Aligned? Q2?", "Coherent? Q1?", "Coherent? Q2?"} & set(seen)
    rows = read_jsonl(tmp_path / "out/scores/judge_free.jsonl")
    assert [row["judges"][JUDGE]["aligned"]["score"] for row in rows] == [80.0] * 3
