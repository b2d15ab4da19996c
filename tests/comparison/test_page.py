"""The report of given run folders: what it says, and that nothing in it can act."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from toy_compare import evaluation

from emarecipes.comparison.results import read_scores
from emarecipes.comparison.run import run_compare
from emarecipes.errors import UserError

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> | `x` {{ 7 * 7 }}"


ANSWERS = {f"Question {i}? {HOSTILE}": f"{i} {HOSTILE}" for i in range(12)}


ARMS = {
    "undefended": ("undefended", 1.0, 0.5),
    "half": ("frontier", 0.5, 0.25),
    "better": ("defense", 0.6, 0.1),
    "slower": ("defense", 0.6, 0.3),
    "good": ("control", 0.1, 0.05),
}


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def write(
    folder: Path,
    seeds: int,
    chosen: dict[str, tuple[str, float, float]] = ARMS,
    half: str = "select",
    **keys: Any,
) -> Path:
    arms = {}
    for number, (name, (role, x, y)) in enumerate(chosen.items()):
        runs = [
            evaluation(
                folder / name / str(s),
                {name: (x, y)},
                seed=100 * number + s,
                answers=ANSWERS,
                half=half,
            )
            for s in range(seeds)
        ]
        (runs[0] / "config.yaml").write_text("defenses: {kl: {}}\n")
        lines = [json.dumps({"step": k, "ce": 4.0 - k / 10, "kl": k / 10}) for k in range(1, 9)]
        (runs[0] / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        label = f"{name} {HOSTILE}"
        arms[name] = {"role": role, "label": label, "collect": [str(run) for run in runs]}
    config = {"output_dir": str(folder / "out"), "seeds": list(range(seeds)), "title": HOSTILE}
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(config | {"arms": arms} | keys))
    return path


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("five")
    assert run_compare(["--config", str(write(folder, 5))]) == 0
    return folder / "out"


def test_hostile_text_is_shown_and_not_run(out: Path) -> None:
    page = Page((out / "report.html").read_text())
    tags = {tag for tag, _ in page.tags}
    assert "script" not in tags
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count(HOSTILE) > 40  # Answers, questions, labels, title: as they were written.


def test_it_needs_no_other_file(out: Path) -> None:
    text = (out / "report.html").read_text()
    sources = [a["src"] for tag, a in Page(text).tags if tag == "img"]
    assert len(sources) == 3
    assert all(str(source).startswith("data:image/png;base64,iVBORw0KGgo") for source in sources)
    assert not re.search(r"https?://|url\(|@import", text)
    assert {path.name for path in out.glob("*.png")} == {
        "trade_off.png", "categories.png", "training.png",
    }  # fmt: skip


def test_verdicts_and_values(out: Path) -> None:
    found = json.loads((out / "comparison.json").read_text())
    arms = found["arms"]
    # The frontier is general = 0.5 x: 0.3 at 0.6. The cue's probe is 0.8 of it; the worst counts.
    assert arms["better"]["excess"]["general"]["value"] == pytest.approx(-0.2, abs=0.01)
    assert arms["better"]["excess"]["general_domain_cue"]["value"] == pytest.approx(-0.16, abs=0.01)
    assert arms["slower"]["excess"]["general"]["value"] == pytest.approx(0.0, abs=0.01)
    decisions = {name: arm["decisions"]["general"] for name, arm in arms.items()}
    assert decisions["better"] == "better"
    assert decisions["slower"] in ("equivalent", "undecided")
    assert decisions["good"] == "control"
    assert found["family"] == ["better", "slower"]
    assert arms["better"]["decisions"]["benign"] == "not measured"


def test_it_says_what_is_open(out: Path) -> None:
    text = " ".join(Page((out / "report.html").read_text()).text.split())
    assert "select half" in text and "provisional" in text
    assert "at least 5 seeds an arm: done" in text
    assert "sampled answers graded by a judge: open" in text
    assert "a benign task was trained under each defense: open" in text
    assert "not a rate of misaligned behaviour" in text


def test_ten_answers_side_by_side(out: Path) -> None:
    page = Page((out / "report.html").read_text())
    kinds = [attributes.get("class") for _, attributes in page.tags]
    # Not of the frontier's arm.
    assert kinds.count("question") == 10 and kinds.count("answer") == 40


def test_markdown_table_is_one_row_an_arm(out: Path) -> None:
    lines = (out / "report.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 2 + 4
    bars = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
    assert bars == {6}
    assert not [line for line in lines if re.search(r"(?<!\\)<script", line)]


def test_one_seed_no_verdict(tmp_path: Path) -> None:
    assert run_compare(["--config", str(write(tmp_path, 1))]) == 0
    text = (tmp_path / "out/report.html").read_text()
    assert "One seed, no verdict" in text and "Intervals are over questions alone" in text
    found = json.loads((tmp_path / "out/comparison.json").read_text())["arms"]
    for name in ("better", "slower"):
        assert set(found[name]["decisions"].values()) <= {"one seed, no verdict", "not measured"}
        excess = found[name]["excess"]["general"]
        # 40 questions with a spread of 0.05 in each of the arm and the curve.
        assert excess["high"] - excess["low"] == pytest.approx(4 * 0.05 * (2 / 40) ** 0.5, rel=0.4)
        assert found[name]["coherent"]["value"] == pytest.approx(11 / 12)


def test_frozen_choices_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(write(tmp_path, 2, half="report"))
    assert run_compare(["--config", config, "frozen=true"]) == 0
    opening = json.loads((tmp_path / "out/choices.json").read_text())
    assert opening["chosen"] == {"better": "better", "slower": "slower"}
    text = (tmp_path / "out/report.html").read_text()
    assert "report half of the general questions, opened on" in text
    assert "Not as it was" not in text and "still those of the select half" not in text
    others = [
        str(evaluation(tmp_path / f"other{seed}", {"other": (0.9, 0.1)}, half="report"))
        for seed in (0, 1)
    ]
    other = f"arms.better.collect={json.dumps(others)}"
    assert run_compare(["--config", config, "frozen=true", other]) == 0
    assert "better  (changed)" in changes(tmp_path, [other])
    assert json.loads((tmp_path / "out/choices.json").read_text()) == opening
    found = changes(tmp_path, ["bounds.effect_share=0.5", "~arms.slower"])
    assert "slower (removed), the bounds." in found
    assert "slower, which was chosen for it, is not in the config any more" in found
    assert "the seeds (0, 1 before, 0, 2 now)" in changes(tmp_path, ["seeds=[0,2]"])
    found = changes(tmp_path, ["arms.slower.role=control"])
    assert "(defense before, control now)." in found
    assert run_compare(["--config", config, "frozen=false"]) == 0
    assert "has not been opened" not in (tmp_path / "out/report.html").read_text()
    capsys.readouterr()
    (tmp_path / "out/choices.json").write_text("{")
    assert run_compare(["--config", config]) == 1
    assert "choices.json: broken" in capsys.readouterr().err


def changes(folder: Path, overrides: list[str]) -> str:
    """What the page of a frozen comparison with these overrides says, in plain words."""
    assert run_compare(["--config", str(folder / "compare.yaml"), "frozen=true", *overrides]) == 0
    return Page((folder / "out/report.html").read_text()).text.replace(HOSTILE, "")


def test_a_half_is_not_claimed_that_was_not_read(tmp_path: Path) -> None:
    config = str(write(tmp_path, 2))  # Evaluated on select.
    assert run_compare(["--config", config, "frozen=true"]) == 0
    text = (tmp_path / "out/report.html").read_text()
    assert "Figures are from the report half" not in text
    assert "the general questions are still those of the select half" in text


def test_a_conditional_probe_of_other_questions_is_told(tmp_path: Path) -> None:
    config = str(write(tmp_path, 2))
    for path in tmp_path.glob("*/*/summary.json"):
        summary = json.loads(path.read_text())
        summary["suites"]["general_domain_cue"]["files"] = {"other.jsonl": "1"}
        summary["sensitivity"] = [{"thresholds": {"alignment": x}} for x in (20, 30)]
        path.write_text(json.dumps(summary))
    assert run_compare(["--config", config]) == 0
    text = " ".join(Page((tmp_path / "out/report.html").read_text()).text.split())
    assert "general_domain_cue: a conditional probe of other questions than general's" in text
    assert "general questions also under training-like conditions: open" in text
    assert "misaligned rates under several thresholds: done 2 of them" in text
    arms = json.loads((tmp_path / "out/comparison.json").read_text())["arms"]
    assert set(arms["better"]["excess"]) == {"general"}


def test_runs_without_metrics_have_a_page(tmp_path: Path) -> None:
    config = str(write(tmp_path, 1))
    for path in tmp_path.glob("*/0/metrics.jsonl"):
        path.unlink()
    (tmp_path / "better/0/metrics.jsonl").write_text("{broken\n")
    assert run_compare(["--config", config]) == 0
    assert (tmp_path / "out/report.html").is_file()
    assert not (tmp_path / "out/training.png").exists()


def damage(run: Path, how: str) -> None:
    scores, summary = run / "scores/general.jsonl", run / "summary.json"
    if how == "truncate":
        scores.write_text(scores.read_text()[:-20])
    elif how == "nan":
        lines = scores.read_text().splitlines()
        lines[3] = re.sub(r'"probe_shift": [-\d.e]+', '"probe_shift": NaN', lines[3])
        scores.write_text("\n".join(lines))
    elif how == "gone":
        summary.unlink()
    elif how == "base":
        summary.write_text(summary.read_text().replace("b" * 64, "c" * 64))
    elif how == "file":  # The same ids, reworded questions.
        found = json.loads(summary.read_text())
        found["suites"]["general"]["files"] = {"data/general_probe/select.jsonl": "1"}
        summary.write_text(json.dumps(found))
    else:
        scores.write_text("\n".join(scores.read_text().splitlines()[1:]))


@pytest.mark.parametrize(
    ("broken", "failed"),
    [
        (
            {
                "truncate": "general.jsonl:40: broken or truncated",
                "nan": "a score is not finite",
                "gone": "cannot be read",
            },
            True,
        ),
        (
            {
                "base": "against another reference than the undefended arm",
                "questions": "has other questions than under the undefended arm",
                "file": "has other questions than under the undefended arm",
            },
            False,
        ),
    ],
    ids=["failed", "not comparable"],
)
def test_broken_arms_do_not_lose_the_others(
    tmp_path: Path, broken: dict[str, str], failed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = ARMS | {how: ("defense", 0.6, 0.3) for how in broken}
    config = str(write(tmp_path, 1, arms))
    for how in broken:
        damage(tmp_path / how / "0", how)
    assert run_compare(["--config", config]) == int(failed)
    error = capsys.readouterr().err
    assert error.count("error: ") == int(failed)
    assert (f"error: {len(broken)} steps failed" in error) == failed
    page = Page((tmp_path / "out/report.html").read_text()).text
    told = list(broken.values())
    assert all(page.count(message) >= told.count(message) for message in told)
    found = json.loads((tmp_path / "out/comparison.json").read_text())["arms"]
    assert found["better"]["excess"] and found["slower"]["excess"]
    assert not [how for how in broken if found[how]["excess"]]


def test_a_seed_that_diverged_does_not_lose_its_arm(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "run", {"seed_0": (1.0, 0.5)})
    summary = json.loads((folder / "summary.json").read_text())
    summary["failed"] = [{"adapter": "seed_1", "folder": "x", "reason": "not finite"}]
    (folder / "summary.json").write_text(json.dumps(summary))
    assert read_scores(folder, {"seed_0": 0, "seed_1": 1}).seeds == (0,)
    with pytest.raises(UserError, match="every adapter failed"):
        read_scores(folder, {"seed_1": 1})
