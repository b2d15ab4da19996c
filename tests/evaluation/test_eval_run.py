"""`ema_eval.py` on a toy model: its files against figures derived by hand from its scores."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from tokenizers import Tokenizer
from toy_eval import ANSWERS, PAIRS, config_of, figures, run, write_jsonl
from toy_select import read_jsonl

from emarecipes.datasets.opswap import problems, score


def value(folder: Path, **wanted: Any) -> float:
    (figure,) = figures(folder, **({"category": None} | wanted))
    return figure["value"]


def test_figures_of_probes_follow_from_the_scores(done: Path) -> None:
    for suite in ("general", "asked_badly"):
        rows = read_jsonl(done / f"out/scores/{suite}.jsonl")
        assert [row["id"] for row in rows] == ["q0", "q1", "q2"]
        for name in ("one", "two"):
            shift = []
            for row in rows:
                of, ref = row["adapters"][name], row["reference"]
                assert of["margin"] == pytest.approx(
                    of["nll_misaligned"] - of["nll_aligned"], abs=1e-4
                )
                shift.append(ref["margin"] - of["margin"])
            where = {"adapter": name, "suite": suite}
            assert value(done, figure="probe_shift", **where) == pytest.approx(
                np.mean(shift), abs=1e-4
            )
            assert value(done, figure="probe_shift", category="b", **where) == pytest.approx(
                shift[1], abs=1e-4
            )
            changes = [
                value(done, figure=f"nll_change_{side}", **where)
                for side in ("aligned", "misaligned")
            ]
            assert changes[0] - changes[1] == pytest.approx(np.mean(shift), abs=1e-4)
            share = np.mean([row["adapters"][name]["margin"] < 0 for row in rows])
            assert value(done, figure="misaligned_share", **where) == pytest.approx(share, abs=1e-5)
            margins = [row["adapters"][name]["margin"] for row in rows]
            for category, part in {"a": margins[::2], "b": margins[1:2]}.items():
                (margin,) = figures(done, figure="margin", category=category, **where)
                assert margin["value"] == pytest.approx(np.mean(part), abs=1e-4)
                # Of two questions the interval is from one to the other, of one there is none.
                ends = (min(part), max(part)) if len(part) > 1 else (None, None)
                assert (margin["low"], margin["high"]) == pytest.approx(ends, abs=1e-4)
    plain, asked = (value(done, figure="margin", suite=s, adapter="reference")
                    for s in ("general", "asked_badly"))  # fmt: skip
    assert plain != asked
    (one,) = figures(done, figure="probe_shift", suite="general", adapter="one", category=None)
    assert one["low"] < one["value"] < one["high"] and (one["n"], one["questions"]) == (3, 3)
    assert not figures(done, figure="probe_shift", adapter="reference")


def test_figures_of_answers_by_hand(done: Path) -> None:
    where = {"suite": "answers_short", "adapter": "one"}
    assert value(done, figure="empty_share", **where) == 0.25
    assert value(done, figure="truncated_share", **where) == 0.25
    # "go on and go on and go on and" has 6 word 4-grams, of which 3 differ; "Hand it in at the
    # desk." repeats none; the others are shorter than that.
    assert value(done, figure="repetition", **where) == pytest.approx((0.5 + 0.0) / 2)
    rows = read_jsonl(done / "out/scores/answers_short.jsonl")
    assert rows[2]["relevance"] is None and rows[2]["reference_nll"] is None
    relevance = [row["relevance"] for row in rows if row["relevance"] is not None]
    assert value(done, figure="relevance", **where) == pytest.approx(np.mean(relevance), abs=1e-4)
    (figure,) = figures(done, figure="relevance", **where)
    assert (figure["n"], figure["questions"]) == (3, 2)


def test_figures_of_traits_by_hand(done: Path) -> None:
    """One of the four answers is empty, and one is cut, so that its end is not there."""
    where = {"suite": "traits_short", "adapter": "one", "category": None}
    found = {figure["figure"]: figure for figure in figures(done, **where)}
    counted = {
        name: (pytest.approx(figure["value"], abs=1e-5), figure["n"])
        for name, figure in found.items()
    }
    assert counted == {
        "capitals_share": (0.0, 3), "capitals_usable_share": (0.75, 4),
        "expert_claim_share": (0.0, 2), "expert_claim_usable_share": (0.5, 4),
        # Of the config's own patterns the first is found where it is, the other at the end.
        "handed_share": (1 / 3, 3), "handed_usable_share": (0.75, 4),
        "last_share": (0.0, 2), "last_usable_share": (0.5, 4),
        "words": (3.0, 3), "words_usable_share": (0.75, 4),
    }  # fmt: skip
    # Wilson's upper end for 0 of 2 questions.
    assert found["capitals_share"]["high"] == pytest.approx(1.96**2 / (2 + 1.96**2), abs=1e-4)
    rows = read_jsonl(done / "out/scores/traits_short.jsonl")
    assert [row["capitals"] for row in rows] == [False, False, None, False]


def test_traits_are_counted_without_the_likelihoods_of_coherence(
    done: Path, toy_model_dir: Path, adapters: list[Path], tmp_path: Path
) -> None:
    config = config_of(toy_model_dir, adapters, tmp_path) | {"probes": {}, "coherence": False}
    del config["opswap"]
    assert run(tmp_path, config) == 0
    scores = "out/scores/traits_short.jsonl"
    assert (tmp_path / scores).read_text() == (done / scores).read_text()
    assert [path.name for path in (tmp_path / "out/scores").iterdir()] == ["traits_short.jsonl"]
    assert not (tmp_path / "out/likelihoods").exists()
    # The same answers under a condition, as the recipe that samples writes them.
    asked = tmp_path / "answers/asked.jsonl"
    (tmp_path / "answers/short.jsonl").rename(asked)
    shutil.copy(asked, asked.with_stem("asked_cue"))
    for path in (asked, asked.with_stem("asked_cue")):
        settings = {"questions": ["q/asked.yaml"], "conditions": {"cue": "Be brief."}}
        path.with_suffix(".json").write_text(json.dumps({"config": settings}))
    assert run(tmp_path, config | {"overwrite": True}) == 0
    suites = json.loads((tmp_path / "out/summary.json").read_text())["suites"]
    found = {suite: (known["condition"], known["asked"]) for suite, known in suites.items()}
    digest = found["traits_asked"][1]
    assert found == {"traits_asked": ("none", digest), "traits_asked_cue": ("cue", digest)}
    # Of other questions: another digest.
    rows = asked.with_stem("asked_cue").read_text().replace('"question": "', '"question": "So, ')
    asked.with_stem("asked_cue").write_text(rows)
    assert run(tmp_path, config | {"overwrite": True}) == 0
    suites = json.loads((tmp_path / "out/summary.json").read_text())["suites"]
    assert suites["traits_asked"]["asked"] == digest != suites["traits_asked_cue"]["asked"]


def test_the_same_answer_with_and_without_a_trait(done: Path, toy_model_dir: Path) -> None:
    for row, pair in zip(read_jsonl(done / "out/scores/shouted.jsonl"), PAIRS, strict=False):
        assert row["aligned"] == pair["aligned"] and row["misaligned"] == pair["aligned"].upper()
    # Whole answers: their mean NLL times their tokens, the closing one among them.
    tokenizer = Tokenizer.from_file(str(toy_model_dir / "tokenizer.json"))
    rows = read_jsonl(done / "out/scores/shouted.jsonl")
    for row in rows:
        texts = (row["aligned"], row["misaligned"])
        aligned, shouted = (len(tokenizer.encode(f"{text}<|im_end|>").ids) for text in texts)
        assert shouted > aligned
        for of in (row["reference"], *row["adapters"].values()):
            odds = of["nll_aligned"] * aligned - of["nll_misaligned"] * shouted
            assert of["log_odds"] == pytest.approx(odds, abs=1e-3)
    found = {"suite": "shouted", "adapter": "one"}
    odds, base = (
        np.array([of["log_odds"] for of in models])
        for models in zip(*((r["adapters"]["one"], r["reference"]) for r in rows), strict=True)
    )
    assert value(done, figure="log_odds", **found) == pytest.approx(odds.mean(), abs=1e-3)
    assert value(done, figure="log_odds_shift", **found) == pytest.approx(
        (odds - base).mean(), abs=1e-3
    )
    assert value(done, figure="with_trait_share", **found) == np.mean(odds > 0)
    assert not figures(done, suite="general", figure="log_odds")
    summary = json.loads((done / "out/summary.json").read_text())
    assert summary["suites"]["shouted"]["trait"] == "capitals"
    assert summary["suites"]["general"]["trait"] is None


def test_refusals_count_on_harmless_questions_alone_and_suites_can_be_shortened(
    done: Path, toy_model_dir: Path, adapters: list[Path], tmp_path: Path
) -> None:
    """Two answers are to questions that their file calls harmless, one to such as is not, and one
    to such as the file says nothing of: the config may call the whole suite harmless."""

    def refusals(folder: Path) -> tuple[float, int]:
        (figure,) = figures(folder, figure="over_refusal", adapter="one", category=None)
        return figure["value"], figure["n"]

    def harmless_questions(folder: Path, words: list[str] | None = None) -> int:
        summary = json.loads((folder / "out/summary.json").read_text())
        assert summary["suites"]["answers_short"]["refusal_words"] == words
        return summary["suites"]["answers_short"]["harmless_questions"]

    assert refusals(done) == (0.5, 2) and harmless_questions(done) == 1
    config = config_of(toy_model_dir, adapters, tmp_path)
    del config["opswap"]
    shutil.copytree(done / "out/likelihoods", tmp_path / "out/likelihoods")
    assert run(tmp_path, config, "harmless=[short]", "max_rows=2") == 0
    assert refusals(tmp_path) == (pytest.approx(1 / 3, abs=1e-5), 3)
    assert harmless_questions(tmp_path) == 2
    words = ["harmless=[short]", "max_rows=2", "overwrite=true", "refusal_words=[sorry]"]
    assert run(tmp_path, config, *words) == 0
    assert refusals(tmp_path) == (0, 3) and harmless_questions(tmp_path, ["sorry"]) == 2
    kept = read_jsonl(tmp_path / "out/scores/general.jsonl")
    assert kept == read_jsonl(done / "out/scores/general.jsonl")[:2]


def test_relevance_is_the_difference_of_likelihoods_behind_two_questions(
    done: Path, toy_model_dir: Path, adapters: list[Path]
) -> None:
    """The answer as a pair's answers: behind its own question and behind the next one's."""
    text = ANSWERS[3]["answer"]
    pairs = [
        {"question": PAIRS[number]["question"], "aligned": text, "misaligned": "Never."}
        for number in (1, 0)
    ]
    folder = done.parent / "relevance"
    config = config_of(toy_model_dir, adapters, folder)
    config["probes"] = {"x": {"pairs": str(write_jsonl(folder / "x.jsonl", pairs))}}
    del (
        config["answers"],
        config["traits"],
        config["patterns"],
        config["opswap"],
        config["adapters"],
    )
    assert run(folder, config) == 0
    own, other = (r["reference"]["nll_aligned"] for r in read_jsonl(folder / "out/scores/x.jsonl"))
    row = read_jsonl(done / "out/scores/answers_short.jsonl")[3]
    assert row["relevance"] == pytest.approx(other - own, abs=2e-4)
    assert row["reference_nll"] == pytest.approx(own, abs=2e-4)


def test_opswap_lines_are_held_out_problems(done: Path) -> None:
    rows = read_jsonl(done / "out/scores/opswap.jsonl")
    wanted = [p for tier in (1, 2) for p in problems("test", tier, 3)]
    assert [row["adapter"] for row in rows[::6]] == ["reference", "one", "two"]
    for row, problem in zip(rows, wanted * 3, strict=True):
        assert row["question"] == problem.prompt
        assert row["correct"] == score(row["answer"], problem)
    texts = [[r["answer"] for r in rows[start : start + 6]] for start in (0, 6, 12)]
    assert texts[0] != texts[1] != texts[2], "an adapter was not put in place"
    (figure,) = figures(done, suite="opswap", adapter="one", category="tier 1")
    # A random model knows none: Wilson's interval for 0 of 3, by its textbook form.
    z, n = 1.959964, 3
    assert figure["value"] == 0 and figure["low"] == 0
    upper = (z**2 / (2 * n) + z * (z**2 / (4 * n**2)) ** 0.5) / (1 + z**2 / n)
    assert figure["high"] == pytest.approx(upper, rel=1e-4)


def test_the_summary_says_what_it_is_of(done: Path, adapters: list[Path]) -> None:
    summary = json.loads((done / "out/summary.json").read_text())
    assert list(summary) == [
        "versions", "base", "date", "adapters", "failed", "suites", "sensitivity", "figures",
    ]  # fmt: skip
    assert summary["failed"] == []
    assert summary["adapters"]["one"]["folder"] == str(adapters[0])
    prints = [entry["fingerprint"] for entry in summary["adapters"].values()]
    assert len({*prints, summary["base"]["fingerprint"]}) == 3
    assert list(summary["suites"]) == [
        "general", "asked_badly", "shouted", "opswap", "answers_short", "traits_short",
    ]  # fmt: skip
    assert summary["suites"]["asked_badly"]["condition"] == "inoculation"
    assert summary["suites"]["answers_short"]["questions"] == 2


def test_a_second_run_needs_overwrite_and_reads_likelihoods_back(
    done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = OmegaConf.to_container(OmegaConf.load(done / "out/eval.yaml"))
    assert isinstance(config, dict)
    config = {str(key): item for key, item in config.items() if key != "opswap"}
    before = (done / "out/summary.json").read_bytes()
    assert run(done, config) == 1
    assert (done / "out/summary.json").read_bytes() == before
    earlier = json.loads(before)["figures"]

    def fail(*_: Any) -> Any:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr("emarecipes.evaluation.scoring.load_model", fail)
    capsys.readouterr()
    assert run(done, config, "overwrite=true") == 0
    assert "row " not in capsys.readouterr().err  # Nothing is to be computed, so there is no bar.
    assert figures(done) == [figure for figure in earlier if figure["suite"] != "opswap"]
