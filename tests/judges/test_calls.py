"""A judge's score in a reply, and prompts with an answer in them."""

from emarecipes.judges import reply as judge_reply
from emarecipes.judges.calls import fill


def test_scores() -> None:
    good = {"85": 85, " 0\n": 0, "100": 100, "72.5": 72.5, "**40**": 40, "85/100": 85, "7.": 7}
    for reply, score in good.items():
        assert judge_reply.parse_score(reply) == score
    for reply in ("101", "-5", "REFUSAL", "CODE", "", "20 to 30", "by rule 3", "nan", "1e2", "1 2"):
        assert judge_reply.parse_score(reply) is None


def test_placeholders_within_an_answer_stay() -> None:
    assert fill("{question}|{answer}|{x}", "a {answer}", r"b {question} \1") == (
        r"a {answer}|b {question} \1|{x}"
    )
