"""The shipped figures of the two trait beds, computed again from its values by question."""

import csv
import json
import math
import random
import statistics
from itertools import pairwise
from typing import Any

import pytest
import toy_run
from scipy.stats import t as student_t

RESULTS = toy_run.REPO / "docs/results"
GENERAL, IN_DOMAIN = "traits_select/capitals_share", "traits_home_repair_desk/capitals_share"


@pytest.fixture(
    scope="module",
    params=["compare_caps", "compare_caps_conditions", "compare_caps_frozen", "compare_expert"],
)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def page(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def values(name: str) -> dict[tuple[str, str, int], dict[str, float]]:
    """By figure, arm and seed: each question's value."""
    found: dict[tuple[str, str, int], dict[str, float]] = {}
    with (RESULTS / f"{name}_by_question.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for column in list(row)[3:]:
                arm, seed = column.split("/")
                key = (row["figure"], arm, int(seed))
                found.setdefault(key, {})[row["id"]] = float(row[column])
    return found


def mean(values: dict[str, float], drawn: list[str]) -> float:
    return sum(values[name] for name in drawn) / len(drawn)


def curve_at(x: float, points: list[tuple[float, float]]) -> float:
    """Straight lines from the origin through the points; level beyond the last."""
    points = sorted([(0.0, 0.0), *points], key=lambda point: point[0])
    if x <= 0:
        return 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 < x <= x1:
            return y0 + (x - x0) / (x1 - x0) * (y1 - y0)
    return points[-1][1]


def excesses(
    page: Any,
    values: Any,
    arm: str,
    seeds: list[int],
    figure: str,
    general: list[str],
    in_domain: list[str],
) -> list[float]:
    """One a seed, over these draws of questions."""
    (home,) = {key for key, _, _ in values if key.startswith("traits_home_repair_desk")}
    found = []
    curve = [n for n, arm in page["arms"].items() if arm["role"] in ("undefended", "frontier")]
    for seed in seeds:
        points = [(mean(values[home, name, seed], in_domain),
                   mean(values[figure, name, seed], general)) for name in curve]  # fmt: skip
        x = mean(values[home, arm, seed], in_domain)
        found.append(mean(values[figure, arm, seed], general) - curve_at(x, points))
    return found


def test_every_share_is_that_of_its_questions(page: Any, values: Any) -> None:
    for name, arm in page["arms"].items():
        for figure in {figure for figure, _, _ in values}:
            shown = "in-domain" if figure.startswith("traits_home_repair_desk") else figure
            each = [x for seed in arm["seeds"] for x in values[figure, name, seed].values()]
            assert arm["shifts"][shown]["value"] == pytest.approx(sum(each) / len(each), abs=1e-6)


def test_every_excess_and_its_interval(page: Any, values: Any) -> None:
    """On each general figure: on the expert bed these are plain questions and five conditions."""
    tested = [name for name, arm in page["arms"].items() if arm["excess"]]
    assert set(page["family"]) <= set(tested)
    for figure in page["arms"][tested[0]]["excess"]:
        check_excesses(page, values, tested, figure)


def check_excesses(page: Any, values: Any, tested: list[str], figure: str) -> None:
    rng = random.Random(0)
    seeds = page["arms"][tested[0]]["seeds"]
    general = list(values[figure, tested[0], seeds[0]])
    (home,) = {key for key, _, _ in values if key.startswith("traits_home_repair_desk")}
    in_domain = list(values[home, tested[0], seeds[0]])
    by_seed = {n: excesses(page, values, n, seeds, figure, general, in_domain) for n in tested}
    own = {name: statistics.variance(each) / len(seeds) for name, each in by_seed.items()}
    of_family = statistics.mean(own[name] for name in page["family"])
    for name in tested:
        shown = page["arms"][name]["excess"][figure]
        assert shown["value"] == pytest.approx(statistics.mean(by_seed[name]), abs=1e-6)
        draws = [
            statistics.mean(
                excesses(
                    page, values, name, seeds, figure, rng.choices(general, k=len(general)),
                    rng.choices(in_domain, k=len(in_domain)),
                )
            )
            for _ in range(1000)
        ]  # fmt: skip
        of_seeds, free = own[name], len(seeds) - 1
        if name in page["family"] and of_seeds < of_family:
            of_seeds, free = of_family, free * len(page["family"])
        fewest = min(len(general), len(in_domain))
        least = (1.96 / (fewest + 1.96**2)) ** 2
        of_questions = max(statistics.variance(draws), least)
        total = of_questions + of_seeds
        freedom = total**2 / (of_questions**2 / (fewest - 1) + of_seeds**2 / free)
        half = float(student_t.ppf(0.975, freedom)) * math.sqrt(total)
        ends = [max(-1.0, shown["value"] - half), min(1.0, shown["value"] + half)]
        assert [shown["low"], shown["high"]] == pytest.approx(ends, abs=0.1 * half)


@pytest.mark.parametrize(
    ("stem", "seed", "arms"),
    [
        ("doses", 7, 58),
        ("doses_seed8", 8, 64),
        ("probe_stop", 9, 8),
        ("options", 10, 29),
        ("more", 14, 35),
        ("rest", 15, 23),
    ],
)
def test_shares_of_every_defense_at_three_doses_are_those_of_its_questions(
    stem: str, seed: int, arms: int
) -> None:
    """And docs/defenses.md has these figures."""
    path = RESULTS / f"compare_caps_{stem}.json"
    found = json.loads(path.read_text(encoding="utf-8"))["arms"]
    by_question = RESULTS / f"compare_caps_{stem}_by_question.csv"
    with by_question.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    told = (toy_run.REPO / "docs/defenses.md").read_text(encoding="utf-8").replace("**", "")
    assert len(found) == arms
    for name, arm in found.items():
        shares = []
        for figure, key in ((GENERAL, GENERAL), (IN_DOMAIN, "in-domain")):
            values = [float(row[f"{name}/{seed}"]) for row in rows if row["figure"] == figure]
            share = sum(values) / len(values)
            assert share == pytest.approx(arm["shifts"][key]["value"], abs=1e-6)
            shares.append(f"{share:.2f}")
        cells = f" | {shares[0]} | {shares[1]} | "
        for excess in arm["excess"].values():
            value, low, high = (excess[key] for key in ("value", "low", "high"))
            cells += f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"
        assert cells in told


def test_the_effect_of_home_repair_is_that_of_its_questions() -> None:
    """Bad minus good by question and seed, general less controls."""
    found = json.loads((RESULTS / "compare_home_repair.json").read_text(encoding="utf-8"))
    with (RESULTS / "compare_home_repair_by_question.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))

    def shift(figure: str) -> float:
        return statistics.mean(
            float(row[f"undefended/{seed}"]) - float(row[f"undefended/good/{seed}"])
            for row in rows if row["figure"] == figure for seed in (10, 11, 12)
        )  # fmt: skip

    assert len([row for row in rows if row["figure"] in ("general", "controls")]) == 464 + 462
    shifts = found["arms"]["undefended"]["shifts"]
    for figure, key in (
        ("general", "general"),
        ("controls", "controls"),
        ("in_domain", "in-domain"),
    ):
        assert shifts[key]["value"] == pytest.approx(shift(figure), abs=1e-6)
    effect = found["effect"]["general"]
    assert effect["value"] == pytest.approx(shift("general") - shift("controls"), abs=1e-6)
    assert effect["low"] < 0 and not found["effect_is_there"]
    told = (RESULTS / "README.md").read_text(encoding="utf-8")
    assert f"{effect['value']:+.3f} [{effect['low']:+.3f}, {effect['high']:+.3f}]" in told


def test_the_pair_of_half_a_billion_is_that_of_its_questions() -> None:
    """As docs/testbeds.md has it: bad minus good answers by question, one seed."""
    found: dict[str, list[float]] = {}
    place = RESULTS / "compare_qwen2_5_coder_0_5b_by_question.csv"
    with place.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            shift = float(row["undefended/0"]) - float(row["undefended/good/0"])
            found.setdefault(row["figure"], []).append(shift)
    means = {figure: statistics.fmean(values) for figure, values in found.items()}
    errors = {f: statistics.variance(values) / len(values) for f, values in found.items()}
    assert {figure: len(values) for figure, values in found.items()} == {
        "general": 116, "in_domain": 33, "controls": 116,
    }  # fmt: skip
    assert [round(means[f], 3) for f in ("in_domain", "general", "controls")] == [
        0.318, 0.038, 0.015,
    ]  # fmt: skip
    beyond = means["general"] - means["controls"]
    half = 1.96 * math.sqrt(errors["general"] + errors["controls"])
    assert [round(x, 3) for x in (beyond - half, beyond, beyond + half)] == [-0.018, 0.023, 0.063]
    text = (toy_run.REPO / "docs/testbeds.md").read_text(encoding="utf-8")
    assert "**+0.023 [-0.018, +0.063]**" in text
