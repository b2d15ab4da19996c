"""`keep: judge`: the published rule, scores and what is none, refusals before weights; no network.

The judge is Inspect's own mock provider. Tests that ask it are skipped where inspect-ai is missing.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toy_run

from emarecipes.errors import UserError
from emarecipes.judges import calls as judge
from emarecipes.persona import run_persona
from emarecipes.persona.kept import Grades
from emarecipes.persona.prompts import load_prompts

TRAIT = "Trait of <{answer}> to <{question}>?"


COHERENCE = "Coherence of <{answer}> to <{question}>?"


PROMPTS = f"""\
trait: curtness
pairs:
  - {{positive: Answer curtly., negative: Answer at length.}}
  - {{positive: You are short with people., negative: You are patient with people.}}
questions: ["How do I make tea?", "What is a noun?", "Why does it rain?", "Why?", "Is it?"]
judge_prompt: "{TRAIT}"
coherence_prompt: "{COHERENCE}"
"""


ANSWERS = 2 * 8 * 5  # Pairs, samples, questions of a side.


def test_the_published_rule() -> None:
    """Trait, coherence: kept on the positive side, on the negative side."""
    rule: dict[tuple[float | None, float | None], tuple[bool, bool]] = {
        (50.0, 50.0): (True, False),
        (49.9, 50.0): (False, True),
        (100.0, 49.9): (False, False),
        (0.0, 49.9): (False, False),
        (None, 100.0): (False, False),
        (100.0, None): (False, False),
        (0.0, None): (False, False),
    }
    for scores, expected in rule.items():
        grades = Grades(*scores)
        assert (grades.keep("positive"), grades.keep("negative")) == expected


# --- asking a judge ----------------------------------------------------------------------------


@pytest.fixture
def mock_judge(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Callable[[str], str]], list[str]]:
    """Make `mockllm/model` reply what a function of the prompt says; gives the prompts it saw."""
    model = pytest.importorskip("inspect_ai.model")
    monkeypatch.setenv("INSPECT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))

    def install(reply: Callable[[str], str]) -> list[str]:
        seen: list[str] = []

        def output(messages: list[Any], *_: Any) -> Any:
            seen.append(messages[0].text)
            found = model.ModelOutput.from_content("mockllm/model", reply(messages[0].text))
            # Given, or the mock would fetch a tokenizer to count them.
            found.usage = model.ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
            return found

        get_model = model.get_model
        monkeypatch.setattr(
            model, "get_model", lambda name, **kw: get_model(name, custom_outputs=output, **kw)
        )
        return seen

    return install


def test_grade_keeps_the_order_and_counts_every_reply(mock_judge: Any) -> None:
    replies = {f"p{i}": str(i) for i in range(40)} | {"p7": "REFUSAL", "p8": "CODE", "p9": ""}
    seen = mock_judge(replies.__getitem__)
    done: list[int] = []
    prompts = [f"p{i}" for i in range(40)]
    scores = judge.grade("mockllm/model", prompts, progress=done.append)
    assert scores == [None if i in (7, 8, 9) else float(i) for i in range(40)]
    assert sum(done) == 40
    assert sorted(seen) == sorted(prompts)
    # Asked again, in a new event loop: all from Inspect's cache.
    assert judge.grade("mockllm/model", prompts, progress=done.append) == scores
    assert len(seen) == 40


def test_a_failed_call_is_one_line_without_the_key(
    mock_judge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "abcdefgh-12345")

    def fail(prompt: str) -> str:
        raise RuntimeError("no access\nwith abcdefgh-12345")

    mock_judge(fail)
    with pytest.raises(UserError) as caught:
        judge.grade("mockllm/model", ["a", "b"], progress=lambda _: None)
    assert str(caught.value) == "the judge mockllm/model failed: no access with ***"


# --- a run -------------------------------------------------------------------------------------


def write_config(folder: Path, model_dir: Path, **change: Any) -> Path:
    (folder / "prompts.yaml").write_text(PROMPTS)
    toy = toy_run.toy_config(model_dir, folder / "rows.jsonl", folder / "out")
    shared = ("output_dir", "tokenizer", "model", "checkpointer", "seed", "device", "dtype")
    config = {key: toy[key] for key in shared} | {
        "prompts": str(folder / "prompts.yaml"),
        "samples_per_question": 8,
        "max_new_tokens": 6,
        "held_out_questions": 0.4,
        "keep": "judge",
        "judge": "mockllm/model",
    }
    return toy_run.write_config(folder / "config.yaml", config | change)


def score_of(prompt: str) -> str:
    """Depends on the prompt alone: 0 to 99, or in one case of eight no score."""
    number = sum(prompt.encode()) % 100
    if "Trait" in prompt:
        return "REFUSAL" if number % 8 == 0 else str(number)
    return "CODE" if number % 8 == 1 else str(min(100, number + 40))


def pair_of(record: dict[str, Any]) -> tuple[int, ...]:
    return record["pair"], record["question"], record["sample"]


def test_a_run(
    mock_judge: Any, tmp_path: Path, toy_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = 2 * 2 * ANSWERS
    seen = mock_judge(score_of)
    path = write_config(tmp_path, toy_model_dir, max_calls=calls, seed=10)
    code = run_persona(["--config", str(path)])
    printed = capsys.readouterr()
    assert code == 0, printed.err

    records = [json.loads(line) for line in (tmp_path / "out/answers.jsonl").open()]
    assert len(records) == 2 * ANSWERS
    answered = [r for r in records if r["tokens"]]
    expected_prompts, unparsable = set(), {"positive": [0, 0], "negative": [0, 0]}
    passed: dict[tuple[int, ...], list[bool]] = {}
    for record in answered:
        asked = [
            t.replace("{question}", record["question_text"]).replace("{answer}", record["answer"])
            for t in (TRAIT, COHERENCE)
        ]
        expected_prompts |= set(asked)
        trait, coherence = (float(s) if s.isdigit() else None for s in map(score_of, asked))
        assert record["trait_score"] == trait
        assert record["coherence_score"] == coherence
        unparsable[record["side"]][0] += trait is None
        unparsable[record["side"]][1] += coherence is None
        right = trait is not None and coherence is not None and coherence >= 50
        right = right and (trait >= 50) == (record["side"] == "positive")
        passed.setdefault(pair_of(record), []).append(right)
    assert set(seen) == expected_prompts
    # The published rule is of pairs: one that passes goes where its counterpart does not.
    assert any(len(both) == 2 and any(both) and not all(both) for both in passed.values())
    for record in answered:
        both = passed[pair_of(record)]
        assert record["kept"] == (len(both) == 2 and all(both))
    assert 0 < sum(r["kept"] for r in answered) < len(answered)

    figures = json.loads((tmp_path / "out/persona.json").read_text())
    assert figures["settings"]["keep"] == "judge"
    assert figures["settings"]["judge"] == "mockllm/model"
    assert figures["settings"]["max_calls"] == calls
    assert "judge" in figures["kept"]
    for side, counts in figures["counts"].items():
        assert [counts["unparsable_trait"], counts["unparsable_coherence"]] == unparsable[side]
    total = sum(map(sum, unparsable.values()))
    assert total > 0
    said = f"Judge mockllm/model: {2 * len(answered)} calls, 2 for each of {len(answered)} answers"
    assert said in printed.out
    assert f"{total} of {2 * len(answered)} replies are no score" in printed.out

    # The resolved config runs again.
    (tmp_path / "again.yaml").write_text((tmp_path / "out/config.yaml").read_text())
    assert run_persona(["--config", str(tmp_path / "again.yaml"), "overwrite=true"]) == 0


def test_a_judge_that_never_gives_a_score(
    mock_judge: Any, tmp_path: Path, toy_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mock_judge(lambda prompt: "I cannot grade this.")
    assert run_persona(["--config", str(write_config(tmp_path, toy_model_dir))]) == 1
    printed = capsys.readouterr()
    assert re.search(r"(\d+) of \1 replies are no score; their answers are not kept", printed.out)
    assert "error: only 0 positive answers were kept" in printed.err
    assert not (tmp_path / "out").exists()


# --- refused before weights --------------------------------------------------------------------


def error_of(folder: Path, model_dir: Path, capsys: Any, **change: Any) -> str:
    """The one line of a refused run."""
    prompts = change.pop("prompts_text", PROMPTS)
    path = write_config(folder, model_dir, **change)
    (folder / "prompts.yaml").write_text(prompts)
    assert run_persona(["--config", str(path)]) == 1
    printed = capsys.readouterr()
    assert "calls" not in printed.out
    (line,) = printed.err.splitlines()
    return line


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("weights were loaded before the mistake was found")

    monkeypatch.setattr("emarecipes.persona.run.load_model", never)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"judge": None}, "keep: judge needs the key judge, an Inspect provider string such as"),
        ({"judge": ""}, "judge: string should have at least 1 character"),
        ({"keep": "all"}, "judge: has no effect with keep: all; leave the key out, or say keep: j"),
        ({"keep": "likelihood", "judge": None, "max_calls": 9}, "max_calls: has no effect with"),
        ({"max_calls": 0}, "max_calls: input should be greater than or equal to 1"),
        ({"max_calls": 79}, "max_calls: 160 answers take up to 320 calls of the judge, 2 each"),
        (
            {"prompts_text": PROMPTS.rpartition("coherence_prompt")[0]},
            "prompts.yaml: keep: judge needs the key coherence_prompt in the prompts file",
        ),
        (
            {"prompts_text": PROMPTS.replace("Coherence of <{answer}>", "Coherence")},
            ":7: coherence_prompt lacks the placeholder {answer}",
        ),
    ],
)
def test_refusals(
    change: dict[str, Any],
    expected: str,
    tmp_path: Path,
    toy_model_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert expected in error_of(tmp_path, toy_model_dir, capsys, **change)


@pytest.mark.usefixtures("no_weights")
def test_inspect_missing(
    tmp_path: Path, toy_model_dir: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, "inspect_ai", None)
    monkeypatch.setitem(sys.modules, "inspect_ai.model", None)
    line = error_of(tmp_path, toy_model_dir, capsys)
    assert "judge: a judge needs inspect-ai, which is not installed: pip install" in line
    assert "'emarecipes[judge]'" in line


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", ["nosuch/model", "gpt", "openai/gpt-4o-mini"])
def test_unknown_providers_and_a_missing_key(
    name: str, tmp_path: Path, toy_model_dir: Path, capsys: Any, monkeypatch: Any
) -> None:
    """Of OpenAI's package and key, whichever is missing first."""
    pytest.importorskip("inspect_ai")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    line = error_of(tmp_path, toy_model_dir, capsys, judge=name)
    assert f"judge: the judge {name} cannot be used: " in line
    assert "[bold]" not in line


def test_the_shipped_prompts_have_both_judge_prompts() -> None:
    prompts = load_prompts(toy_run.REPO / "data/persona/ill_will.yaml")
    for text in (prompts.judge_prompt, prompts.coherence_prompt):
        assert text is not None
        assert text.endswith("Reply with the bare number and nothing else.")
