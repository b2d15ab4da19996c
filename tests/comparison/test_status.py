"""What a comparison says of itself while it runs, by hand."""

import json
import time
from pathlib import Path

import pytest

from emarecipes.comparison.status import Piece, Status
from emarecipes.progress import Note, duration


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    return now


def write(path: Path, done: int, total: int, seconds: float) -> None:
    note = {"title": "", "done": done, "total": total, "unit": "step", "seconds": seconds}
    path.write_text(json.dumps(note))


def test_the_time_left_of_all(tmp_path: Path, clock: list[float]) -> None:
    status = Status()
    status.expect(
        [
            Piece("A, narrow task, seed 0: training", "training", "narrow"),
            Piece("B: training", "training", "narrow", size=0.5),
            Piece("C: training", "training", "benign"),
            Piece("A: scores", "scores", "narrow"),
        ]
    )
    assert status.seconds_left() is None  # Nothing is known yet.
    note = tmp_path / "note"
    with status.running("A, narrow task, seed 0: training", note):
        assert status.line() == "0 of 4 done | A, narrow task, seed 0: training, starting"
        clock[0] += 10.0  # Two of them to load, eight for two of twelve steps: 40 more to come.
        write(note, done=2, total=12, seconds=8.0)
        # A: 40. B: half of 50. C like A: 50. Scores by a guess of 0.6 of 50: 30.
        assert status.seconds_left() == pytest.approx(40 + 25 + 50 + 30)
        assert status.line() == (
            "0 of 4 done | A, narrow task, seed 0: training, step 2 of 12 | about 2 min left of all"
        )
        clock[0] += 50.0
    # A took 60 in truth. B: 30; C: 60, there is none of its task; scores: 36.
    assert status.seconds_left() == pytest.approx(30 + 60 + 36)
    with status.running("A: scores", note):
        clock[0] += 12.0
        assert status.seconds_left() == pytest.approx(30 + 60 + 24)
    status.drop("C: training")
    assert status.line() == "2 of 3 done | about 30 s left of all"


def test_what_a_recipe_tells_is_the_least_that_it_takes(tmp_path: Path, clock: list[float]) -> None:
    """Scores that go on for longer than was guessed are not called done in no time."""
    status = Status()
    status.expect(
        [
            Piece("A: training", "training", "narrow"),
            Piece("A: scores", "scores", "narrow"),
            Piece("A: scores of good", "scores", "good"),
        ]
    )
    with status.running("A: training", tmp_path / "note"):
        clock[0] += 100.0
    assert status.seconds_left() == pytest.approx(60 + 60)  # A guess of 0.6 of it each.
    note = tmp_path / "scores"
    with status.running("A: scores", note):
        clock[0] += 10.0
        write(note, done=10, total=100, seconds=10.0)  # 90 to come.
        assert status.seconds_left() == pytest.approx(90 + 60)
        clock[0] += 90.0
        write(note, done=100, total=100, seconds=100.0)  # What follows it tells nothing of.
        assert status.seconds_left() == pytest.approx(0 + 60)
        clock[0] += 20.0
    assert status.seconds_left() == pytest.approx(120)  # Now one of its kind has ended.
    with status.running("A: scores of good", note):
        clock[0] += 10.0
        write(note, done=1, total=100, seconds=10.0)  # Slower than that one.
        assert status.seconds_left() == pytest.approx(990)


def test_trainings_side_by_side_share_the_time(tmp_path: Path, clock: list[float]) -> None:
    status = Status(at_a_time=2)
    status.expect(Piece(name, "training", "narrow") for name in "abc")
    with status.running("a", tmp_path / "note"):
        clock[0] += 60.0
    assert status.seconds_left() == pytest.approx(2 * 60 / 2)


def test_a_resumed_run_is_timed_by_what_it_does_itself() -> None:
    assert Note("", 50, 60, "step", seconds=20.0, first=40).seconds_left() == pytest.approx(20.0)
    assert Note("", 40, 60, "step", seconds=20.0, first=40).seconds_left() is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (11100, "3 h 5 min")],
)
def test_a_duration_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text
