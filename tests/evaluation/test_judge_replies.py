"""How a judge's replies are read, from a server of our own that answers badly."""

import math
from typing import Any

import pytest
from fake_judge import JUDGE, SECRET, Call, cut, in_tokens, serve

from emarecipes.errors import UserError
from emarecipes.judges.calls import ask
from emarecipes.judges.reply import Reply, expected_score, parse_score, read_kind

pytest.importorskip("inspect_ai")
pytest.importorskip("openai")

pytestmark = pytest.mark.usefixtures("judge_client")


# --- one reply ---------------------------------------------------------------------------------


def test_kinds() -> None:
    kinds = {"85": "score", " 7.\n": "score", "CODE": "code", "**Refusal.**": "refusal",
             "I cannot rate this.": "unparsable", "": "unparsable", "101": "unparsable",
             "CODE 30": "unparsable"}  # fmt: skip
    assert {text: read_kind(text) for text in kinds} == kinds


def test_expectation_by_hand() -> None:
    def score(number: str, **p: float) -> float | None:
        return expected_score(number, [(k.lstrip("t"), math.log(v)) for k, v in p.items()])

    assert score("85", t85=0.5, t80=0.25, tREFUSAL=0.25) == pytest.approx(
        (85 * 0.5 + 80 * 0.25) / 0.75
    )
    assert score("5", t5=0.6, t10=0.4) == pytest.approx(5 * 0.6 + 10 * 0.4)
    # Digits alone: the tokenizer may split numbers, and 8 may be the start of 85.
    assert score("8", t8=0.6, t9=0.4) is None
    # Out of range, and too little probability on numbers.
    assert score("85", t85=0.2, t850=0.8) is None
    assert expected_score("85", [(" 85", math.log(0.5)), ("85", math.log(0.3))]) == 85.0


# --- the server --------------------------------------------------------------------------------


def ask_server(prompts: list[str], **options: Any) -> list[Reply]:
    return ask(JUDGE, prompts, progress=lambda _: None, **options)


def test_rate_limits_errors_and_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, int] = {}

    def reply(call: Call) -> Any:
        seen[call.prompt] = seen.get(call.prompt, 0) + 1
        if call.prompt == "busy" and seen["busy"] < 3:
            return 429
        if call.prompt == "down" and seen["down"] < 5:  # Beyond the client's own attempts.
            return 500
        return {"busy": "10", "down": "20", "prose": "I would say 30.", "code": "CODE",
                "refuse": "REFUSAL", "nothing": ""}[call.prompt]  # fmt: skip

    prompts = ["busy", "down", "prose", "code", "refuse", "nothing"]
    with serve(reply) as server:
        monkeypatch.setenv("FAKE_BASE_URL", server.url)
        replies = ask_server(prompts, max_tokens=8)
        assert [r.score for r in replies] == [10.0, 20.0, None, None, None, None]
        assert [r.kind for r in replies] == [
            "score", "score", "unparsable", "code", "refusal", "unparsable",
        ]  # fmt: skip
        assert replies[2].text == "I would say 30."
        assert seen["busy"] == 3 and seen["down"] == 5
        assert {call.key for call in server.calls} == {f"Bearer {SECRET}"}
        assert {call.body["temperature"] for call in server.calls} == {0}
        assert all(call.body["max_tokens"] == 8 for call in server.calls)
        assert not any("top_logprobs" in call.body for call in server.calls)
        count = len(server.calls)
        assert ask_server(prompts, max_tokens=8) == replies
        assert len(server.calls) == count, "replies were not in the cache"


def test_log_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    replies = {"a": ("80", {"80": 0.5, "90": 0.3, "CODE": 0.2}), "b": "70", "c": ("8", {"8": 1.0})}
    with serve(lambda call: replies[call.prompt]) as server:
        monkeypatch.setenv("FAKE_BASE_URL", server.url)
        found = ask_server(list(replies), top_logprobs=5)
        assert all(call.body["top_logprobs"] == 5 for call in server.calls)
    assert [r.score for r in found] == [pytest.approx((80 * 0.5 + 90 * 0.3) / 0.8), 70.0, 8.0]
    assert [r.expected for r in found] == [True, False, False]


THOUGHTS = "<think>It could be 5 or 95. 95?\n95</think>"


def test_a_judge_that_thinks_aloud_is_read_at_its_end() -> None:
    """The end counts; a number in prose, or in thoughts that do not end, is none."""
    scores = {
        "It could be 5 or 95.\n95": 95, f"{THOUGHTS}\n\n5": 5, "Thought of 5 or 95.</think>95": 95,
        "It harms people, so 5 or 10.\n\n**Final score (0 to 100): 7/100**": 7,
        "Low. Rating: 12.": 12, "5\nOn second thought,\n95": 95,
        "<think>It could be 5 or 95.\n95": None, "Between 5 and 95.": None, "10\n90": None,
        "Score: 5 to 10": None, "95\nThat is because": None, "Score: 101": None,
    }  # fmt: skip
    assert {text: parse_score(text) for text in scores} == scores
    assert read_kind(f"{THOUGHTS}\nREFUSAL") == "refusal" and read_kind("Code 5?\nCODE") == "code"


def test_a_score_on_another_scale_is_none_and_what_has_no_width_is_nothing() -> None:
    scores = {
        "Score (0-1): 0.9": None, "Score (0 to 1): 1": None, "Score (of 100): 90": 90.0,
        "Rating (1-10): 8": None, "Score out of 10: 8": None, "Score: 8/10": None,
        "Score (0-100): 80": 80, "Score (1 to 100): 80": 80, "Score out of 100: 80": 80,
        "There is no reason to downgrade: 12": None, "Score: 85\u200b": 85, "\ufeff85": 85,
    }  # fmt: skip
    assert {text: parse_score(text) for text in scores} == scores


def test_log_probabilities_are_those_of_the_last_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thoughts hold the reply's number too, with other probabilities, and so does `/100`."""
    thought, other = ("95", {"95": 0.9, "5": 0.1}), ("5", {"95": 0.8, "15": 0.2})
    last = ("5", {"5": 0.75, "15": 0.25})
    between = [(text, {text: 1.0}) for text in ("<think>", " or ", "</think>")]
    spoken = [between[0], other, between[1], thought, between[2], last]
    choices = {
        "apart": in_tokens("5", *spoken),  # As Inspect gives what the server calls reasoning.
        "aloud": in_tokens("<think>5 or 95</think>5", *spoken),
        "labelled": in_tokens("95 or not? Score: 5", thought, (" or not? Score: ", {}), last),
        "of all": in_tokens("100/100", ("100", {"100": 0.5, "80": 0.5}), ("/", {}), ("100", {})),
        "split": in_tokens("95", ("9", {"9": 0.5, "8": 0.5}), ("5", {"5": 1.0})),
        "lost": in_tokens("95", ("5", {"5": 1.0})),
    }
    with serve(lambda call: choices[call.prompt]) as server:
        monkeypatch.setenv("FAKE_BASE_URL", server.url)
        found = ask_server(list(choices), top_logprobs=5)
    expected = 5 * 0.75 + 15 * 0.25
    assert [r.score for r in found] == pytest.approx([expected] * 3 + [90, 95, 95])
    assert [r.expected for r in found] == [True, True, True, True, False, False]


def test_a_cut_reply_counts_where_no_further_digit_could_change_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The published judge replies with one token, and is cut after it."""
    one = cut("5") | in_tokens("5", ("5", {"5": 0.5, "15": 0.5}))
    choices = {
        "whole": cut("85"), "a digit": cut("8"), "of a hundred": cut("10"), "expected": one,
        "thoughts": cut("<think>It could be 95"), "prose": cut("I begin with\n85"),
    }  # fmt: skip
    with serve(lambda call: choices[call.prompt]) as server:
        monkeypatch.setenv("FAKE_BASE_URL", server.url)
        found = ask_server(list(choices))
    assert [r.score for r in found] == [85.0, None, None, 10.0, None, None]
    assert [r.cut for r in found] == [False, True, True, False, True, True]
    assert {r.kind for r in found if r.cut} == {"unparsable"}


def test_a_judge_that_stays_down_is_one_line_without_the_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serve(lambda call: 500) as server:
        monkeypatch.setenv("FAKE_BASE_URL", server.url)
        with pytest.raises(UserError) as caught:
            ask_server(["a"])
    message = str(caught.value)
    assert message.startswith(f"the judge {JUDGE} failed: ")
    assert SECRET not in message and "\n" not in message


@pytest.mark.parametrize("status", [401, 500, None])
def test_a_service_that_is_down_beside_a_refused_prompt_stays_an_error(
    monkeypatch: pytest.MonkeyPatch, status: int | None
) -> None:
    with serve(lambda call: 400 if call.prompt == "bad" else status) as server:
        monkeypatch.setenv("FAKE_BASE_URL", server.url if status else "http://127.0.0.1:9/v1")
        with pytest.raises(UserError, match="failed: "):
            ask_server(["bad", "good"], refused={})
