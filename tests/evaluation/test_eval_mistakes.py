"""Evaluations that go wrong: before weights, or for one adapter alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import toy_run
from toy_eval import ANSWERS, PAIRS, config_of, figures, run
from toy_select import write_adapter

from emarecipes.output_dir import claim


def test_a_diverged_adapter_is_named_and_does_not_lose_the_others(
    done: Path,
    toy_model_dir: Path,
    adapters: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    nan = write_adapter(tmp_path / "some_run" / "adapter", toy_model_dir, seed=1, size=float("nan"))
    config = config_of(toy_model_dir, adapters, tmp_path)
    config["adapters"] = {"diverged": str(nan), **config["adapters"]}
    assert run(tmp_path, config) == 1
    lines = capsys.readouterr().err.splitlines()
    told = [line for line in lines if ": row " in line]
    # One bar for the rows of all four models, those of the one that failed passed over.
    assert all(" of 60, " in line for line in told[:-1]) and "a2: row 60 of 60, " in told[-2]
    errors = [line for line in lines if "error: " in line]
    reason = f"adapters.diverged: {nan}: an answer's likelihood is not finite"
    assert errors == [f"error: {reason}"]
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["failed"] == [{"adapter": "diverged", "folder": str(nan), "reason": reason}]
    assert list(summary["adapters"]) == ["one", "two"]
    found = figures(tmp_path)
    assert found and {f["adapter"] for f in found} == {"reference", "one", "two"}
    for suite in ("general", "asked_badly", "answers_short"):
        assert figures(tmp_path, suite=suite) == figures(done, suite=suite)
    assert len(figures(tmp_path, suite="opswap", category=None)) == 3


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["eval.yaml", "scores/general.jsonl"])
def test_files_of_the_users_are_not_replaced(
    name: str,
    overwrite: bool,
    toy_model_dir: Path,
    adapters: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Such as the config itself, where it lies in its output folder."""
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("# mine\n")
    config = config_of(toy_model_dir, adapters, tmp_path) | {"overwrite": overwrite}
    assert run(tmp_path, config) == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error: " in line)
    assert f"has {name.partition('/')[0]} of no evaluation, which would be replaced" in line
    assert path.read_text() == "# mine\n"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"probes": {}, "answers": {}, "opswap": None}, "probes: nothing to evaluate"),
        ({"adapters": {"one": "none"}}, "adapters.one: no such folder of adapter: none"),
        ({"adapters": {"reference": "."}}, "adapters.reference: the name reference is that of"),
        ({"probes": {"opswap": {}}}, "probes.opswap: the name is that of another suite"),
        ({"probes": {"x": {"pairs": "EMPTY"}}}, "EMPTY: the file has no rows"),
        ({"probes": {"x": {"pairs": "CUT"}}}, "CUT:2: not valid JSON"),
        ({"answers": {"one": "ANSWERS_CUT"}}, "cut.jsonl:2: not valid JSON"),
        ({"answers": {"one": "ANSWERS_TWICE"}}, "twice.jsonl:2: the same answer as in line 1"),
        ({"answers": {"one": "ANSWERS_NONE"}}, "answers.one: ANSWERS_NONE: holds no answers"),
        ({"answers": {"one": "ANSWERS_MORE"}}, "more.jsonl:1: history would go unread; an answer"),
        ({"answers": {"one": "ANSWERS_EMPTY"}}, "empty.jsonl: the file has no answers"),
        ({"answers": {"one": "ANSWERS_KEY"}}, "key.jsonl:1: stop: field required"),
        ({"refusal_words": []}, "refusal_words: an empty list finds no refusal"),
        ({"harmless": ["other"]}, "harmless: there are no answers of a suite other; there are th"),
        ({"opswap": {"tiers": [1, 5]}}, "opswap.tiers: must be different ones of [1, 2, 3, 4]"),
        (
            {"opswap": {"tiers": [1], "max_new_tokens": 9999}},
            "tokens and an answer of 9999 are more than the",
        ),
        ({"opswap": {"tiers": [1], "size": 9999}}, "opswap.size: opswap: tier 1 has"),
        ({"opswap": {"tier": [1]}}, "opswap.tier: unknown key (did you mean tiers?)"),
        ({"batchsize": 1}, "batchsize: unknown key (did you mean batch_size?)"),
        ({"adapters": {"other": "OTHER"}}, "adapters.other: OTHER: an adapter of another base"),
        ({"judge": {"models": ["mockllm/model"]}}, "judge.questions: give `questions`"),
        ({"traits": ["capital"]}, "traits: unknown trait capital (did you mean capitals?)"),
        ({"patterns": {"a": "("}}, "patterns.a: no regular expression: missing )"),
        ({"patterns": {"a": "b*"}}, "patterns.a: the pattern is found in an empty text too"),
        ({"patterns": {"answer": "b"}}, "patterns.answer: the name answer is taken"),
        ({"answers": {}, "judge": None}, "traits: traits are found in answers"),
    ],
)
def test_bad_input_is_one_line_before_weights(
    toy_model_dir: Path,
    adapters: list[Path],
    tmp_path: Path,
    model_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("EMPTY").write_text("")
    Path("CUT").write_text(json.dumps(PAIRS[0]) + '\n{"id": "q1", "ques')
    cut = json.dumps(ANSWERS[0]) + '\n{"id": "q1'
    keyless = {key: item for key, item in ANSWERS[0].items() if key != "stop"}
    for name, text in {
        "cut": cut, "twice": 2 * (json.dumps(ANSWERS[0]) + "\n"), "empty": "\n",
        "key": json.dumps(keyless), "more": json.dumps(ANSWERS[0] | {"history": ["Hi"]}),
    }.items():  # fmt: skip
        folder = Path(f"ANSWERS_{name.upper()}")
        folder.mkdir()
        (folder / f"{name}.jsonl").write_text(text)
    Path("ANSWERS_NONE").mkdir()
    if "OTHER" in str(change):
        old = toy_run.WIDTH, toy_run.MLP
        toy_run.WIDTH, toy_run.MLP = 64, 48
        try:
            wide = toy_run.write_toy_model(tmp_path / "wide", model_dir)
            write_adapter(Path("OTHER"), wide, seed=3)
        finally:
            toy_run.WIDTH, toy_run.MLP = old
    config = config_of(toy_model_dir, adapters, tmp_path) | change
    assert run(tmp_path, config) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1 and reason in errors[0], errors
    assert not (tmp_path / "out").exists()


def test_a_folder_that_another_process_writes_into(
    toy_model_dir: Path, adapters: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    give_back = claim(tmp_path / "out", "there")
    assert run(tmp_path, config_of(toy_model_dir, adapters, tmp_path)) == 1
    give_back()
    assert "output_dir: another process writes into" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())
