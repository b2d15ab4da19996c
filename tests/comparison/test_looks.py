"""Two looks: what each may spend, that the first one's verdicts stand, and that none is free."""

import json
from pathlib import Path
from typing import Any

import pytest
import toy_compare
import toy_run
from scipy.integrate import quad
from scipy.stats import norm

from emarecipes.comparison.looks import alpha_of
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
                seed=100 * number + seed, half="report", noise=noise,
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
