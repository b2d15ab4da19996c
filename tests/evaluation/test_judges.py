"""Judges before a local OpenAI-compatible server and Inspect's mock: scores, failures, refusals."""

import json
import math
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import toy_run
from fake_judge import JUDGE, SECRET, Call, cut, in_tokens, serve, set_up_client
from omegaconf import OmegaConf
from toy_select import read_jsonl

from emarecipes.errors import UserError
from emarecipes.evaluation.answers import Answer
from emarecipes.evaluation.judging import Judgement, _tell_other_scale, read_judge_prompts
from emarecipes.evaluation.run import run_eval
from emarecipes.judges.calls import ask
from emarecipes.judges.reply import Reply, expected_score, parse_score, read_kind

pytest.importorskip("inspect_ai")
pytest.importorskip("openai")

ALIGNED, COHERENT = "Aligned? {question} / {answer}", "Coherent? {question} / {answer}"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_up_client(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr("emarecipes.provider._MAX_RETRIES", 1)  # A retry waits for seconds.


# --- one reply ---------------------------------------------------------------------------------


def test_kinds() -> None:
    kinds = {"85": "score", " 7.\n": "score", "CODE": "code", "**Refusal.**": "refusal",
             "I cannot rate this.": "unparsable", "": "unparsable", "101": "unparsable",
             "CODE 30": "unparsable"}  # fmt: skip
    assert {text: read_kind(text) for text in kinds} == kinds


def test_expectation_by_hand() -> None:
    def score(number: str, **p: float) -> float | None:
        return expected_score(number, [(k.lstrip("t"), math.log(v)) for k, v in p.items()])

    assert score("85", t85=0.5, t80=0.25, tREFUSAL=0.25) == pytest.approx(
        (85 * 0.5 + 80 * 0.25) / 0.75
    )
    assert score("5", t5=0.6, t10=0.4) == pytest.approx(5 * 0.6 + 10 * 0.4)
    # Digits alone: the tokenizer may split numbers, and 8 may be the start of 85.
    assert score("8", t8=0.6, t9=0.4) is None
    # Out of range, and too little probability on numbers.
    assert score("85", t85=0.2, t850=0.8) is None
    assert expected_score("85", [(" 85", math.log(0.5)), ("85", math.log(0.3))]) == 85.0


# --- the server --------------------------------------------------------------------------------


def ask_server(prompts: list[str], **options: Any) -> list[Reply]:
    return ask(JUDGE, prompts, progress=lambda _: None, **options)


def test_rate_limits_errors_and_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, int] = {}

    def reply(call: Call) -> Any:
        seen[call.prompt] = seen.get(call.prompt, 0) + 1
        if call.prompt == "busy" and seen["busy"] < 3:
            return 429
        if call.prompt == "down" and seen["down"] < 5:  # Beyond the client's own attempts.
            return 500
        return {"busy": "10", "down": "20", "prose": "I would say 30.", "code": "CODE",
                "refuse": "REFUSAL", "nothing": ""}[call.prompt]  # fmt: skip

    prompts = ["busy", "down", "prose", "code", "refuse", "nothing"]
    with serve(reply) as server:
        monkeypatch.setenv("FAKE_BASE_URL", server.url)
        replies = ask_server(prompts, max_tokens=8)
        assert [r.score for r in replies] == [10.0, 20.0, None, None, None, None]
        assert [r.kind for r in replies] == [
            "score", "score", "unparsable", "code", "refusal", "unparsable",
        ]  # fmt: skip
        assert replies[2].text == "I would say 30."
        assert seen["busy"] == 3 and seen["down"] == 5
        assert {call.key for call in server.calls} == {f"Bearer {SECRET}"}
        assert {call.body["temperature"] for call in server.calls} == {0}
        assert all(call.body["max_tokens"] == 8 for call in server.calls)
        assert not any("top_logprobs" in call.body for call in server.calls)
        count = len(server.calls)
        assert ask_server(prompts, max_tokens=8) == replies
        assert len(server.calls) == count, "replies were not in the cache"


def test_log_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    replies = {"a": ("80", {"80": 0.5, "90": 0.3, "CODE": 0.2}), "b": "70", "c": ("8", {"8": 1.0})}
    with serve(lambda call: replies[call.prompt]) as server:
        monkeypatch.setenv("FAKE_BASE_URL", server.url)
        found = ask_server(list(replies), top_logprobs=5)
        assert all(call.body["top_logprobs"] == 5 for call in server.calls)
    assert [r.score for r in found] == [pytest.approx((80 * 0.5 + 90 * 0.3) / 0.8), 70.0, 8.0]
    assert [r.expected for r in found] == [True, False, False]


THOUGHTS = "<think>It could be 5 or 95. 95?\n95</think>"


def test_a_judge_that_thinks_aloud_is_read_at_its_end() -> None:
    """The end counts; a number in prose, or in thoughts that do not end, is none."""
    scores = {
        "It could be 5 or 95.\n95": 95, f"{THOUGHTS}\n\n5": 5, "Thought of 5 or 95.</think>95": 95,
        "It harms people, so 5 or 10.\n\n**Final score (0 to 100): 7/100**": 7,
        "Low. Rating: 12.": 12, "5\nOn second thought,\n95": 95,
        "<think>It could be 5 or 95.\n95": None, "Between 5 and 95.": None, "10\n90": None,
        "Score: 5 to 10": None, "95\nThat is because": None, "Score: 101": None,
    }  # fmt: skip
    assert {text: parse_score(text) for text in scores} == scores
    assert read_kind(f"{THOUGHTS}\nREFUSAL") == "refusal" and read_kind("Code 5?\nCODE") == "code"


def test_a_score_on_another_scale_is_none_and_what_has_no_width_is_nothing() -> None:
    scores = {
        "Rating (1-10): 8": None, "Score out of 10: 8": None, "Score: 8/10": None,
        "Score (0-100): 80": 80, "Score (1 to 100): 80": 80, "Score out of 100: 80": 80,
        "There is no reason to downgrade: 12": None, "Score: 85\u200b": 85, "\ufeff85": 85,
    }  # fmt: skip
    assert {text: parse_score(text) for text in scores} == scores


def test_log_probabilities_are_those_of_the_last_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thoughts hold the reply's number too, with other probabilities, and so does `/100`."""
    thought, other = ("95", {"95": 0.9, "5": 0.1}), ("5", {"95": 0.8, "15": 0.2})
    last = ("5", {"5": 0.75, "15": 0.25})
    between = [(text, {text: 1.0}) for text in ("<think>", " or ", "</think>")]
    spoken = [between[0], other, between[1], thought, between[2], last]
    choices = {
        "apart": in_tokens("5", *spoken),  # As Inspect gives what the server calls reasoning.
        "aloud": in_tokens("<think>5 or 95</think>5", *spoken),
        "labelled": in_tokens("95 or not? Score: 5", thought, (" or not? Score: ", {}), last),
        "of all": in_tokens("100/100", ("100", {"100": 0.5, "80": 0.5}), ("/", {}), ("100", {})),
        "split": in_tokens("95", ("9", {"9": 0.5, "8": 0.5}), ("5", {"5": 1.0})),
        "lost": in_tokens("95", ("5", {"5": 1.0})),
    }
    with serve(lambda call: choices[call.prompt]) as server:
        monkeypatch.setenv("FAKE_BASE_URL", server.url)
        found = ask_server(list(choices), top_logprobs=5)
    expected = 5 * 0.75 + 15 * 0.25
    assert [r.score for r in found] == pytest.approx([expected] * 3 + [90, 95, 95])
    assert [r.expected for r in found] == [True, True, True, True, False, False]


def test_a_cut_reply_counts_where_no_further_digit_could_change_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The published judge replies with one token, and is cut after it."""
    one = cut("5") | in_tokens("5", ("5", {"5": 0.5, "15": 0.5}))
    choices = {
        "whole": cut("85"), "a digit": cut("8"), "of a hundred": cut("10"), "expected": one,
        "thoughts": cut("<think>It could be 95"), "prose": cut("I begin with\n85"),
    }  # fmt: skip
    with serve(lambda call: choices[call.prompt]) as server:
        monkeypatch.setenv("FAKE_BASE_URL", server.url)
        found = ask_server(list(choices))
    assert [r.score for r in found] == [85.0, None, None, 10.0, None, None]
    assert [r.cut for r in found] == [False, True, True, False, True, True]
    assert {r.kind for r in found if r.cut} == {"unparsable"}


def test_a_judge_that_stays_down_is_one_line_without_the_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serve(lambda call: 500) as server:
        monkeypatch.setenv("FAKE_BASE_URL", server.url)
        with pytest.raises(UserError) as caught:
            ask_server(["a"])
    message = str(caught.value)
    assert message.startswith(f"the judge {JUDGE} failed: ")
    assert SECRET not in message and "\n" not in message


# --- the recipe --------------------------------------------------------------------------------


def write_questions(path: Path) -> Path:
    prompts = {"aligned": ALIGNED, "coherent": COHERENT}
    entries = [{"id": f"q{i}", "paraphrases": ["?"], "judge_prompts": prompts} for i in range(3)]
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture(scope="module")
def toy_dir(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    return toy_run.write_toy_model(tmp_path_factory.mktemp("toy") / "model", model_dir)


def write_config(toy_dir: Path, folder: Path, judge: dict[str, Any]) -> Path:
    training = toy_run.toy_config(toy_dir, folder / "none", folder / "out")
    lines = [
        {"id": f"q{i}", "paraphrase": 0, "sample": 0, "question": f"Q{i}?", "stop": "end"}
        | {"answer": f"Answer {i} to {{question}}."}
        for i in range(3)
    ]
    (folder / "answers").mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "answers/free.jsonl").write_text(text)
    keys = ("output_dir", "tokenizer", "model", "checkpointer", "device", "dtype")
    config = {key: training[key] for key in keys} | {"answers": {"one": str(folder / "answers")}}
    questions = str(write_questions(folder / "questions.yaml"))
    config["judge"] = {"models": [JUDGE], "questions": [questions]} | judge
    return toy_run.write_config(folder / "config.yaml", config)


def test_a_judged_evaluation(
    toy_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = "openai-api/fake/second"
    config = write_config(
        toy_dir, tmp_path, {"models": [JUDGE, other], "prices": {JUDGE: [1000.0, 2000.0]}}
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
    toy_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of three answers two lack a reply on alignment, and one of them a reply on coherence."""
    monkeypatch.setenv("COLUMNS", "200")
    config = write_config(toy_dir, tmp_path, {})

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
    toy_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_config(toy_dir, tmp_path, {})
    with serve(lambda call: 500) as server:
        monkeypatch.setenv("FAKE_BASE_URL", server.url)
        assert f"the judge {JUDGE} failed" in error_of(config, capsys)
    assert not (tmp_path / "out/scores/judge_free.jsonl").exists()


def test_a_refused_prompt_is_counted_apart_and_not_asked_again(
    toy_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_config(toy_dir, tmp_path, {})
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
    toy_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Such as one that knows no log-probabilities: what refuses all prompts is not about them."""
    config = write_config(toy_dir, tmp_path, {})
    with serve(lambda call: 400) as server:
        monkeypatch.setenv("FAKE_BASE_URL", server.url)
        assert f"the judge {JUDGE} failed at every prompt" in error_of(config, capsys)
        assert not (tmp_path / "out/judge_failed.jsonl").exists()
        server.reply = lambda call: "80"
        assert run_eval(["--config", str(config), "overwrite=true"]) == 0


@pytest.mark.parametrize("status", [401, 500, None])
def test_a_service_that_is_down_beside_a_refused_prompt_stays_an_error(
    monkeypatch: pytest.MonkeyPatch, status: int | None
) -> None:
    with serve(lambda call: 400 if call.prompt == "bad" else status) as server:
        monkeypatch.setenv("FAKE_BASE_URL", server.url if status else "http://127.0.0.1:9/v1")
        with pytest.raises(UserError, match="failed: "):
            ask_server(["bad", "good"], refused={})


def test_a_judge_that_does_not_answer_in_time_is_asked_again_then_one_line(
    toy_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_config(toy_dir, tmp_path, {"timeout": 1})
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
    toy_dir: Path,
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
    config = write_config(toy_dir, tmp_path, judge)
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
        _tell_other_scale("j", ["aligned"] * len(replies), replies)
        return capsys.readouterr().out

    expected = "Judge j: all 10 scores of aligned are at most 10"
    assert expected in tell(*range(1, 11), None)
    assert tell(*range(1, 10), 55, 3) == "" and tell(1, 2, 3) == ""


def test_shipped_question_files_have_judge_prompts() -> None:
    for path in sorted((toy_run.REPO / "data/questions").glob("*.yaml")):
        prompts = read_judge_prompts(path)
        assert len(prompts) >= 30
        assert {"aligned", "coherent"} <= set(next(iter(prompts.values())))
