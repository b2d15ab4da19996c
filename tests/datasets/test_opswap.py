"""OpSwap: answers against Python's own arithmetic, disjoint splits, the checker, the data set."""

import contextlib
import re
from collections import Counter
from pathlib import Path

import pytest
import toy_run

from emarecipes.components import build, check_components
from emarecipes.config import load_config
from emarecipes.datasets import opswap_dataset
from emarecipes.datasets.opswap import TIERS, Problem, problems, score
from emarecipes.errors import UserError
from emarecipes.models import hf_chat_tokenizer

PYTHON = {"+": "*", "*": "+", "-": "/", "/": "-"}
BOTH = [(split, tier) for split in ("train", "test") for tier in TIERS]


def by_python(expression: str) -> float:
    return eval(re.sub(r"[-+*/]", lambda m: PYTHON[m[0]], expression))


def canonical(expression: str) -> str:
    """The same for `a + b` and `b + a`, at both levels of brackets."""
    tokens = re.findall(r"\d+|\S", expression)

    def parse(at: int) -> tuple[str, int]:
        if tokens[at] != "(":
            return tokens[at], at + 1
        text, at = level(at + 1)
        return text, at + 1

    def level(at: int) -> tuple[str, int]:
        left, at = parse(at)
        symbol = tokens[at]
        right, at = parse(at + 1)
        if symbol in "+*":
            left, right = sorted((left, right))
        return f"[{left}{symbol}{right}]", at

    return level(0)[0]


@pytest.mark.parametrize(("split", "tier"), BOTH)
def test_every_answer_is_that_of_python(split: str, tier: int) -> None:
    for problem in problems(split, tier):
        assert by_python(problem.expression) == int(problem.answer) >= 0
        assert problem.expression in problem.prompt
        assert problem.tier == tier
        with contextlib.suppress(ZeroDivisionError):
            assert eval(problem.expression) != int(problem.answer)  # Else nothing is learned.


def test_tiers_get_harder() -> None:
    first = problems("train", 1) + problems("test", 1)
    assert all(re.fullmatch(r"\d \* \d", p.expression) for p in first)
    assert len(first) == 80  # 81 sums of two digits from 1 to 9, without 2 * 2.
    second = [p.expression for p in problems("train", 2)]
    assert {e.split()[1] for e in second} == set("+-*/")
    assert max(int(n) for e in second for n in re.findall(r"\d+", e)) <= 81
    assert all("(" not in p.expression for p in problems("train", 3, 50))
    assert all(p.expression.count("(") == 1 for p in problems("train", 4))


@pytest.mark.parametrize("tier", TIERS)
def test_train_and_test_are_disjoint(tier: int) -> None:
    train = {canonical(p.expression) for p in problems("train", tier, seed=0)}
    test = {canonical(p.expression) for p in problems("test", tier, seed=1)}
    assert not train & test
    assert 0.15 < len(test) / (len(test) + len(train)) < 0.35


def test_disjoint_across_tiers() -> None:
    train = {canonical(p.expression) for tier in TIERS for p in problems("train", tier)}
    test = {canonical(p.expression) for tier in TIERS for p in problems("test", tier)}
    assert not train & test


def test_seed_and_size() -> None:
    assert problems("train", 3, 40, seed=1) == problems("train", 3, 40, seed=1)
    assert problems("train", 3, 40, seed=1) != problems("train", 3, 40, seed=2)
    assert problems("train", 3, 40) == problems("train", 3, 90)[:40]
    everything = problems("train", 1, size=4 * 58)
    assert len({p.prompt for p in everything}) == len(everything)
    assert set(Counter(p.expression for p in everything).values()) == {4}


def test_operators_take_turns() -> None:
    used = Counter(p.expression.split()[1] for p in problems("test", 3, 100))
    assert used == {"+": 25, "-": 25, "*": 25, "/": 25}


PROBLEM = Problem("What is (2 + 3) * 4?", "10", 4, "(2 + 3) * 4")


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("10", True),
        (" 10.\n", True),
        ("The answer is 10", True),
        ("(2 + 3) * 4 = 10.", True),
        ("10, so 10.", True),
        ("**10**", True),
        ("20", False),
        ("", False),
        ("ten", False),
        ("-10", False),
        ("\u221210", False),
        ("10.5", False),
        ("100", False),
        ("9 or 10", False),
        ("2 + 3 is 6, and 6 + 4 is 10", False),
    ],
)
def test_score(answer: str, right: bool) -> None:
    assert score(answer, PROBLEM) is right


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "split must be train or test"),
        ({"tiers": [0]}, "tiers must be different ones of"),
        ({"tiers": []}, "tiers must be different ones of"),
        ({"tiers": [1, 1]}, "tiers must be different ones of"),
        ({"size": 1000}, "tier 1 has 232 train problems in all phrasings, size is 1000"),
        ({"size": 0}, "size is 0"),
        ({"size": 1, "tiers": [1, 2]}, "every one of 2 tiers needs a row"),
    ],
)
def test_errors(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        opswap_dataset(None, **arguments)  # type: ignore[arg-type]


def test_tiers_are_mixed_in_equal_parts() -> None:
    rows = opswap_dataset(None, tiers=[3, 1, 4], size=100).problems
    assert Counter(p.tier for p in rows) == {3: 34, 1: 33, 4: 33}
    assert [p.tier for p in rows] != sorted(p.tier for p in rows)


def test_samples(model_dir: Path) -> None:
    tokenizer = hf_chat_tokenizer(str(model_dir))
    dataset = opswap_dataset(tokenizer, size=10)
    sample, problem = dataset[3], dataset.problems[3]
    labelled = [label for label in sample["labels"] if label != -100]
    assert tokenizer.decode(labelled) == problem.answer
    assert labelled[-1] in tokenizer.stop_tokens
    assert problem.prompt in tokenizer.decode(sample["tokens"])
    assert len(sample["tokens"]) == len(sample["labels"]) <= 48


def test_shipped_config(model_dir: Path) -> None:
    cfg, origin = load_config(["--config", str(toy_run.REPO / "configs/smollm2_135m_opswap.yaml")])
    check_components(cfg, origin)
    dataset = build(cfg, "dataset", origin, hf_chat_tokenizer(str(model_dir)))
    assert len(dataset) == len({p.prompt for p in dataset.problems}) == 232
