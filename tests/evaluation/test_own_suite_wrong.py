"""Suites of one's own that are wrong: told before weights, or before a summary holds them."""

import json
from pathlib import Path
from typing import Any

import pytest
from toy_suite import config_of

from emarecipes.evaluation.run import run_eval

pytestmark = pytest.mark.usefixtures("users_folder")

BROKEN = """
from emarecipes.evaluation import Figure, Scored, Suite

class Base(Suite):
    def score(self, models):
        return self.given(Figure("one", self.name, "f", None, 0.5, 0.4, 0.6, 2, 2, "share"))

class Fine(Base):
    def given(self, figure):
        return Scored([figure], [{"id": "q"}])

class NoScore(Suite):
    pass

class Nothing(Base):
    def given(self, figure):
        return None

class NoFigure(Base):
    def given(self, figure):
        return Scored([], [{"id": "q"}])

class NoUnit(Base):
    def given(self, figure):
        return Scored([figure.__class__(**{**vars(figure), "unit": ""})], [])

class NoInterval(Base):
    def given(self, figure):
        return Scored([figure.__class__(**{**vars(figure), "low": None})], [])

class NotANumber(Base):
    def given(self, figure):
        return Scored([figure.__class__(**{**vars(figure), "value": float("nan")})], [])

class Crossed(Base):
    def given(self, figure):
        return Scored([figure.__class__(**{**vars(figure), "low": 0.7})], [])

class Text(Base):
    def given(self, figure):
        return Scored([figure.__class__(**{**vars(figure), "value": "0.5"})], [])

class Twice(Base):
    def given(self, figure):
        return [Scored([figure], []), Scored([figure], [])]

class NotJson(Base):
    def given(self, figure):
        return Scored([figure], [{"id": "q", "said": {1}}])

class Whole(Base):
    def given(self, figure):
        return 7

class Beyond(Base):
    def given(self, figure):
        return Scored([figure.__class__(**{**vars(figure), "value": 2.0, "high": 2.0})], [])

class Counted(Base):
    def given(self, figure):
        return Scored([figure.__class__(**{**vars(figure), "n": "2"})], [])

class Outside(Base):
    def given(self, figure):
        inside = figure.__class__(**{**vars(figure), "suite": "mine_../x"})
        return Scored([inside], [], part="../x")

class OfOurs(Base):
    kind = "probe"

class Elsewhere(Base):
    def given(self, figure):
        return Scored([figure.__class__(**{**vars(figure), "suite": "general"})], [])

class Unknown(Base):
    def given(self, figure):
        return Scored([figure.__class__(**{**vars(figure), "adapter": "two"})], [])

class NoId(Base):
    def given(self, figure):
        return Scored([figure], [{"adapter": "one"}])

class Taken(Base):
    def given(self, figure):
        found = figure.__class__(**{**vars(figure), "suite": "mine_y"})
        return Scored([found], [{"id": "q"}], {}, "y")

class Refuses(Base):
    def check(self, context):
        raise ValueError("no such claims")

class OfAnswers(Base):
    needs_answers = True
"""


@pytest.mark.parametrize(
    ("suite", "reason"),
    [
        (
            {"_component_": "broken.Scored"},
            "suites.mine._component_: Scored is not a subclass",
        ),
        ({"claims": []}, "suites.mine: a suite needs a _component_, the path of its class"),
        ({"_component_": "broken.Nothng"}, "broken has no Nothng (did you mean Nothing?)"),
        ({"_component_": "broken.Refuses", "claims": 1}, "suites.mine.claims: unknown key"),
        (
            {"_component_": "broken.NoScore"},
            "suites.mine: Can't instantiate abstract class",
        ),
        ({"_component_": "broken.Refuses"}, "suites.mine: no such claims"),
        ({"_component_": "broken.OfOurs"}, "OfOurs has a `kind`; leave it out"),
        (
            {"_component_": "broken.OfAnswers"},
            "suites.mine: is of sampled answers; name fold",
        ),
    ],
)
def test_what_is_wrong_with_an_entry_is_told_before_weights(
    toy: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    suite: dict[str, Any],
    reason: str,
) -> None:
    Path("broken.py").write_text(BROKEN)
    assert error_of(config_of(toy, suites={"mine": suite}), capsys).count(reason) == 1
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"probes": {"mine": {"pairs": "x"}}}, "suites.mine: the name is also that of probes.mine"),
        (
            {"suites": {"judge_x": {"_component_": "broken.Base"}}},
            "judge_x: the name is that",
        ),
        ({"suites": {"a b": {"_component_": "broken.Base"}}}, "suites.a b: a name is letters"),
    ],
)
def test_two_suites_do_not_share_a_name(
    toy: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    keys: dict[str, Any],
    reason: str,
) -> None:
    Path("broken.py").write_text(BROKEN)
    config = config_of(toy, **({"suites": {"mine": {"_component_": "broken.Base"}}} | keys))
    assert reason in error_of(config, capsys)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "Nothing",
            "suites.mine: Nothing.score gave nothing; it gives Scored(figures, lines",
        ),
        ("NoFigure", "suites.mine: NoFigure.score gave no figure"),
        ("NoUnit", "suites.mine: NoUnit.score: the figure f has no unit"),
        ("NoInterval", "suites.mine: NoInterval.score: the figure f has no interval"),
        ("NotANumber", "suites.mine: NotANumber.score: the figure f is nan"),
        ("Crossed", "suites.mine: Crossed.score: the figure f has an interval from 0.7 to 0.6"),
        ("Text", "suites.mine: Text.score: the figure f is '0.5', from 0.4: a float is needed"),
        ("Twice", "suites.mine: Twice.score: the figure f is there twice"),
        ("NotJson", "suites.mine: NotJson.score: the line of q: Object of type set is not JSON"),
        ("Whole", "suites.mine: Whole.score gave int; it gives Scored(figures, lines"),
        ("Beyond", "suites.mine: Beyond.score: the figure f is 2 [0.4, 2.0]; a share is from 0"),
        ("Counted", "suites.mine: Counted.score: the figure f is of '2' values and 2 questions"),
        ("Outside", "suites.mine: Outside.score: a part's name is letters"),
        ("Elsewhere", "suites.mine: Elsewhere.score: the figure f is of the suite general, not of"),
        ("Unknown", "suites.mine: Unknown.score: the figure f is of two, which is no model here"),
        ("NoId", "suites.mine: NoId.score: a line needs an id, of its question"),
        ("Taken", "suites.mine: there is another suite mine_y; rename one"),
    ],
)
def test_a_figure_that_no_summary_should_hold_is_refused(
    toy: tuple[Path, Path], capsys: pytest.CaptureFixture[str], name: str, reason: str
) -> None:
    """What was found before it is written: it comes last."""
    Path("broken.py").write_text(BROKEN)
    suites = {"mine_y": {"_component_": "broken.Fine"}, "mine": {"_component_": f"broken.{name}"}}
    assert reason in error_of(config_of(toy, suites=suites), capsys)
    assert list(json.loads(Path("out/summary.json").read_text())["suites"]) == ["mine_y"]


def error_of(config: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert run_eval(["--config", str(config)]) == 1
    (line,) = [s for s in capsys.readouterr().err.splitlines() if s.startswith("error: ")]
    return line
