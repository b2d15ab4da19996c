"""Two looks: what each may spend, that the first one's verdicts stand, and that none is free."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import toy_compare
import toy_run
from scipy.integrate import quad
from scipy.stats import norm

from emarecipes.comparison.looks import FirstLook, alpha_of
from emarecipes.comparison.run import run_compare
from emarecipes.comparison.settings import check_compare_settings
from emarecipes.config import load_config

# Role, in-domain and general shift at each look, noise. The frontier is general = 0.5 x.
ARMS: dict[str, tuple[str, float, tuple[float, float], float]] = {
    "undefended": ("undefended", 1.0, (0.5, 0.5), 0.05),
    "half": ("frontier", 0.5, (0.25, 0.25), 0.05),
    "strong": ("defense", 0.6, (0.1, 0.3), 0.05),
    "weak": ("defense", 0.6, (0.14, 0.14), 0.3),
}


def test_what_is_spent() -> None:
    """Textbooks' 0.00305 of 0.05 at half of the data; the two are all of it, and not more."""
    assert alpha_of(1) == pytest.approx(0.00305, abs=1e-5)
    assert alpha_of(1) + alpha_of(2) == pytest.approx(0.05)
    # One hypothesis, looks of correlation 1/sqrt 2: P(either below its part), by integration.
    first, last = (norm.isf(alpha_of(look) / 2) for look in (1, 2))

    def kept(x: float) -> float:
        sides = norm.cdf([(edge - x * 0.5**0.5) / 0.5**0.5 for edge in (last, -last)])
        return float(norm.pdf(x) * (sides[0] - sides[1]))

    wrong = 1 - quad(kept, -first, first)[0]
    assert 0.045 < wrong < 0.05


def write(folder: Path, look: int) -> Path:
    """Runs as they are at a look: the first one has half of the questions."""
    arms = {}
    for number, (name, (role, x, general, noise)) in enumerate(ARMS.items()):
        runs = [
            toy_compare.evaluation(
                folder / f"look{look}" / name / str(seed), {name: (x, general[look - 1])},
                seed=100 * number + seed, half="report", noise=noise, trained=f"{name} {seed}",
            )
            for seed in (0, 1)
        ]  # fmt: skip
        arms[name] = {"role": role, "collect": [str(run) for run in runs]}
    config = {"output_dir": str(folder / "out"), "seeds": [0, 1], "frozen": True, "arms": arms}
    return toy_run.write_config(folder / f"look{look}.yaml", config)


def compared(config: Path, *overrides: str) -> dict[str, Any]:
    assert run_compare(["--config", str(config), *overrides]) == 0
    found: dict[str, Any] = json.loads((config.parent / "out/comparison.json").read_text())
    return found


def decisions(found: dict[str, Any]) -> dict[str, str]:
    return {name: found["arms"][name]["decisions"]["general"] for name in ("strong", "weak")}


def test_the_first_look_decides_what_it_can_and_the_second_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    last = write(tmp_path, 2)
    monkeypatch.setattr(toy_compare, "QUESTIONS", toy_compare.QUESTIONS // 2)
    first = write(tmp_path, 1)
    looks = "looks.first=[max_rows=20]"
    found = compared(first, looks)
    p = found["arms"]["weak"]["verdict"]["p_difference"]
    assert alpha_of(1) < p < alpha_of(2)  # One look alone would call it better.
    assert decisions(found) == {"strong": "better", "weak": "undecided"}
    page = (tmp_path / "out/report.md").read_text()
    assert (
        "First of two looks, at 20 general questions: a verdict here needs a Holm-corrected" in page
    )
    assert "p below 0.0031" in page and "It decided: strong." in page

    capsys.readouterr()
    assert run_compare(["--config", str(last)]) == 1
    assert "looks: a first look was taken on" in capsys.readouterr().err

    # By now "strong" has an excess of 0: what was decided stands, the figures are the new ones.
    found = compared(last, looks, "looks.at=2")
    assert decisions(found) == {"strong": "better", "weak": "better"}
    assert [found["arms"][name]["verdict"]["look"] for name in ("strong", "weak")] == [1, 0]
    assert found["arms"]["strong"]["excess"]["general"]["value"] == pytest.approx(0, abs=0.01)
    page = (tmp_path / "out/report.md").read_text()
    assert "Second of two looks" in page and "p below 0.0469" in page
    assert "at the first look)" in page
    assert not [line for line in found["missing"] if "look" in line]
    # The same questions again are no second look.
    again = compared(first, looks, "looks.at=2")
    assert any("the last look read 20 general questions" in line for line in again["missing"])


def at_both_looks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    last = write(folder, 2)
    monkeypatch.setattr(toy_compare, "QUESTIONS", toy_compare.QUESTIONS // 2)
    return write(folder, 1), last


def other_runs(folder: Path, shift: float) -> str:
    runs = [
        toy_compare.evaluation(folder / f"other/{seed}", {"other": (0.6, shift)}, seed=50 + seed,
                               half="report", trained=f"other {seed}")
        for seed in (0, 1)
    ]  # fmt: skip
    return json.dumps([str(run) for run in runs])


def test_a_first_look_stands_for_the_runs_it_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, last = at_both_looks(tmp_path, monkeypatch)
    worse = other_runs(tmp_path, 0.9)
    found = compared(first, "looks.first=[max_rows=20]")
    last_look = ["--config", str(last), "looks={at: 2, first: [max_rows=20]}"]
    record = (tmp_path / "out/looks.json").read_bytes()
    capsys.readouterr()
    for change, named in {
        f"arms.strong.collect={worse}": "strong (changed)",
        f"arms.half.collect={worse}": "half (changed)",
        "~arms.half": "half (removed)",
        f"arms.slow={{role: frontier, collect: {worse}}}": "slow (added)",
        "bounds.effect_share=0.5": "the bounds",
        "criteria.general.suite=general_domain_cue": "the criteria",
    }.items():
        assert run_compare([*last_look, change]) == 1
        [line] = capsys.readouterr().err.splitlines()
        assert f"looks.at: the first look's verdicts, of {found['first_look']['taken']}" in line
        assert f"these are other now: {named}; put them back" in line
    assert (tmp_path / "out/looks.json").read_bytes() == record
    # One more defense takes nothing from the verdicts that stand.
    new = f"arms.new={{collect: {worse}}}"
    assert decisions(compared(last, *last_look[2:], new))["strong"] == "better"


def test_a_first_look_is_taken_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, last = at_both_looks(tmp_path, monkeypatch)
    better = other_runs(tmp_path, -0.2)
    looks = "looks.first=[max_rows=20]"
    # The weak arm's second seed is not there at first: what was lacking may come to the look.
    summary = tmp_path / "look1/weak/1/summary.json"
    whole = summary.read_text()
    summary.unlink()
    assert run_compare(["--config", str(first), looks]) == 1
    record = json.loads((tmp_path / "out/looks.json").read_text())
    assert record["runs"]["weak"] == {"0": "", "1": ""}
    assert record["runs"]["strong"] == {"0": "strong 0", "1": "strong 1"}
    assert record["curve"] == ["undefended", "half"] and record["last"] == ""
    summary.write_text(whole)
    compared(first, looks)
    page = (tmp_path / "out/report.md").read_bytes()
    kept = (tmp_path / "out/looks.json").read_bytes()
    assert json.loads(kept)["runs"]["weak"] == {"0": "weak 0", "1": "weak 1"}
    assert json.loads(kept)["taken"] == record["taken"]
    compared(first, looks)
    assert (tmp_path / "out/report.md").read_bytes() == page

    def refused(*changes: str) -> str:
        capsys.readouterr()
        assert run_compare(["--config", str(first), looks, *changes]) == 1
        [line] = capsys.readouterr().err.splitlines()
        return line

    for change, named in {
        f"arms.weak.collect={better}": "weak (changed)",
        f"arms.new={{collect: {better}}}": "new (added)",
        "~arms.weak": "weak (removed)",
        "looks.first=[max_rows=30]": "looks.first",
        "bounds.effect_share=0.5": "the bounds",
    }.items():
        line = refused(change)
        assert f"these are other now: {named}; it is taken once" in line
    collected = []
    for name in ARMS:
        runs = [tmp_path / f"look1/{name}/{seed}" for seed in (0, 1)]
        third = tmp_path / f"third/{name}"
        runs.append(toy_compare.evaluation(third, {name: (0.5, 0.2)}, half="report"))
        collected.append(f"arms.{name}.collect={json.dumps([str(run) for run in runs])}")
    assert "the seeds ([0, 1] then, [0, 1, 2] now)" in refused("seeds=[0,1,2]", *collected)
    assert (tmp_path / "out/looks.json").read_bytes() == kept

    compared(last, looks, "looks.at=2")
    compared(last, looks, "looks.at=2")
    assert "looks.at: the last look was taken on " in refused()


def test_a_look_of_an_older_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, last = at_both_looks(tmp_path, monkeypatch)
    looks, path = "looks.first=[max_rows=20]", tmp_path / "out/looks.json"
    compared(first, looks)
    whole = json.loads(path.read_text())
    old = {key: whole[key] for key in ("taken", "questions", "verdicts")}
    path.write_text(json.dumps(old))
    compared(first, looks)  # The same verdicts: it is known now at which runs it looked.
    assert json.loads(path.read_text()) == whole
    path.write_text(json.dumps(old))
    capsys.readouterr()
    changed = f"arms.weak.collect={other_runs(tmp_path, -0.2)}"
    assert run_compare(["--config", str(first), looks, changed]) == 1
    assert "had other verdicts than those of now" in capsys.readouterr().err
    assert json.loads(path.read_text()) == old
    found = compared(last, looks, "looks.at=2")
    assert any("looks.json is of an earlier version" in line for line in found["missing"])
    assert decisions(found)["strong"] == "better"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("looks={at: 2, first: [max_rows=2]}", "looks.at: there was no first look; take it with 1"),
        ("looks={first: []}", "looks: list should have at least 1 item"),
        ("looks={at: 3, first: [max_rows=2]}", "looks: input should be 1 or 2"),
        ("looks={first: [rows]}", "an override is written key=value"),
    ],
)
def test_looks_that_cannot_be_are_refused(
    change: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path, 2)
    given = ["tasks.narrow.evaluate.config=configs/smollm2_135m_eval.yaml", change]
    assert run_compare(["--config", str(config), *given]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line
    assert run_compare(["--config", str(config), "frozen=false", "looks.first=[max_rows=2]"]) == 1
    assert "they need frozen: true" in capsys.readouterr().err


def test_the_first_look_is_of_its_own_half_and_task() -> None:
    config = str(toy_run.REPO / "configs/compare_smollm2_135m_quick.yaml")
    raw, origin = load_config(["--config", config, "frozen=true", "looks.first=[max_rows=22]"])
    settings = check_compare_settings(raw, origin).settings
    assert settings.first_look("narrow", "report") == ["max_rows=22"]
    assert settings.first_look("good", "report") == ["max_rows=22"]
    assert settings.first_look("narrow", "select") == settings.first_look("benign", "report") == []
    raw.looks.at = 2
    assert check_compare_settings(raw, origin).settings.first_look("narrow", "report") == []


def test_a_first_look_taken_again_gains_runs_and_loses_none() -> None:
    first = FirstLook("then", 4, {}, runs={"kl": {"0": "a", "1": ""}})
    fuller = FirstLook("now", 4, {}, runs={"kl": {"0": "a", "1": "b"}})
    failed = FirstLook("now", 4, {}, runs={"kl": {"0": "", "1": "b"}})
    assert first.taken_again(failed) is first
    assert first.taken_again(fuller) == replace(fuller, taken="then")
