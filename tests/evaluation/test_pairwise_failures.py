"""Pairwise judgements that fail: interrupted, wrong or unusable."""

from pathlib import Path
from types import ModuleType

import pytest
from fake_judge import JUDGE, SECRET, Call, serve
from toy_pairwise import ADAPTERS, CRUEL, QUESTIONS, honest, result, run, shown, write_evaluation
from toy_select import read_jsonl

from emarecipes.command import run_alone

pytest.importorskip("inspect_ai")
pytest.importorskip("openai")

pytestmark = pytest.mark.usefixtures("judge_client")


def test_an_interrupted_run_goes_on_and_a_result_is_not_replaced(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = write_evaluation(tmp_path / "e", lambda k, q: f"{CRUEL} {k} {q}")
    argv = [str(folder), "--judge", JUDGE, "--output", str(folder / "out")]
    asked: list[int] = []

    def again(*more: str) -> int:
        before = len(server.calls)
        code = run_alone("probe_judged", script.run, [*argv, "--max-connections", "1", *more])
        asked.append(len(server.calls) - before)
        return code

    # One failure more than a twentieth of 160.
    with serve(lambda call: 400 if 100 < call.number <= 109 else honest(call)) as server:
        monkeypatch.setenv("FAKE_BASE_URL", server.url)
        assert again() == 1
        errors = [e for e in capsys.readouterr().err.splitlines() if "error: " in e]
        assert len(errors) == 1 and f"error: the judge {JUDGE} failed: " in errors[0]
        assert SECRET not in errors[0] and not (folder / "out").exists()

        assert again() == 0
        # What was on its way when the judge was given up may be asked again.
        assert asked[0] >= 109 and 169 <= sum(asked) <= 171, asked
        assert result(folder)[1] == [1.0] * 8
        assert again() == 1
        assert "already holds judged.json" in capsys.readouterr().err.splitlines()[-1]
        assert again("--overwrite") == 0
        assert asked[2:] == [0, 0]


@pytest.mark.parametrize(
    ("break_it", "more", "reason"),
    [
        (None, ["--max-calls", "159"], "--max-calls: 160 calls are needed, more than 159"),
        (None, ["--judge", "nobody/model"], "the judge nobody/model cannot be used"),
        (None, ["--probe", "other"], "no suite other of kind probe; there are: general"),
        (None, ["--answers", "other"], "no suite answers_other of kind answers"),
        ("summary.json", [], "summary.json: is not as ema_eval.py writes it"),
        ("scores/general.jsonl", [], "general.jsonl: is not as ema_eval.py writes it"),
        ("scores/answers_general.jsonl", [], "answers_general.jsonl: is not as ema_eval.py"),
        ("seven", [], "7 adapters have both general and answers_general; a correlation over"),
        ("no reference", [], "lacks the reference's answers"),
        ("one fewer", [], "run7 and of the reference are not to the same questions: see q9"),
        (None, ["--output", "FILE"], "FILE is a file, not a folder"),
        ("nothing", [], "summary.json: cannot be read: No such file"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_before_the_first_call(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    break_it: str | None,
    more: list[str],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE").touch()
    adapters = 7 if break_it == "seven" else ADAPTERS
    folder = write_evaluation(tmp_path / "e", lambda k, q: f"{k} {q}", adapters=adapters)
    answers = folder / "scores/answers_general.jsonl"
    lines = answers.read_text().splitlines(keepends=True)
    if break_it == "no reference":
        answers.write_text("".join(line for line in lines if "reference" not in line))
    elif break_it == "one fewer":
        answers.write_text("".join(lines[: 8 * QUESTIONS - 1] + lines[8 * QUESTIONS :]))
    elif break_it == "nothing":
        (folder / "summary.json").unlink()
    elif break_it not in (None, "seven"):
        (folder / break_it).write_text('{"suites": []}\n')
    code, server = run(script, folder, monkeypatch, *more)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert code == 1 and len(errors) == 1 and reason in errors[0], errors
    assert not server.calls and not (folder / "out").exists()


def test_no_usable_judgement_is_one_line_with_the_replies_kept(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = write_evaluation(tmp_path / "e", lambda k, q: f"{k} {q}")
    assert run(script, folder, monkeypatch, reply=lambda _: "Sorry.")[0] == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: no usable judgement of run0") and "'refused': 160" in error
    assert len(read_jsonl(folder / "out/judgements.jsonl")) == 160


def test_mostly_unparsable_judgements_give_no_correlation(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = write_evaluation(tmp_path / "e", lambda k, q: f"{k} {q}")

    def reply(call: Call) -> str:
        return "A" if any(text.endswith(("8", "9")) for text in shown(call)) else "Let us see."

    assert run(script, folder, monkeypatch, reply=reply)[0] == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "most judgements are neither A, B nor tie" in error and "'unparsable': 128" in error
    assert error.endswith("needs more --max-tokens")
