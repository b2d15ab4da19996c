"""A chat template that reads the clock: the day it is told, and that another run can be told."""

import pickle
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from chat_families import FAMILIES, LLAMA_3
from torchtune.data import Message

from emarecipes import clock
from emarecipes.errors import UserError
from emarecipes.models import hf_chat_tokenizer

# As Llama 3.2's begins, with the day of the month without a zero and the week besides.
DATED = """
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y, %A, week %W, day %j") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "<|eot_id|>" }}
"""
CHAT = [Message("user", "Which day is it?", masked=True), Message("assistant", "You know.")]


class Afternoon(datetime):
    """transformers' clock: it knows no other day than today."""

    @classmethod
    def now(cls, tz: Any = None) -> "Afternoon":
        return cls(2025, 3, 7, 15, 30)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    FAMILIES["llama3"].write(tmp_path)
    return tmp_path


def test_a_day_renders_as_transformers_does_on_that_day(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Afternoon)
    template = DATED + LLAMA_3
    chat = [{"role": m.role, "content": m.text_content} for m in CHAT]
    expected = (
        FAMILIES["llama3"]
        .reference()
        .apply_chat_template(chat, chat_template=template, return_dict=False)
    )
    named = hf_chat_tokenizer(str(folder), chat_template=template, date="2025-03-07")
    assert named.tokenize_messages(CHAT)[0] == expected
    assert "Today Date: 07 Mar 2025, Friday, week 09, day 066" in named.decode(expected)

    monkeypatch.setattr(clock, "local_day", lambda: "2025-03-07")
    of_today = hf_chat_tokenizer(str(folder), chat_template=template)
    monkeypatch.setattr(clock, "local_day", lambda: "2025-03-08")
    for tokenizer in (of_today, pickle.loads(pickle.dumps(of_today))):
        assert tokenizer.date == "2025-03-07"
        assert tokenizer.tokenize_messages(CHAT)[0] == expected
    assert hf_chat_tokenizer(str(folder), chat_template=template).date == "2025-03-08"
    assert hf_chat_tokenizer(str(folder)).date is None, "it does not read the clock"


@pytest.mark.parametrize("day", ["28.11.2026", "20261128", "2026-02-30", "2026-11-28T09:00", ""])
def test_what_is_no_day_is_refused(folder: Path, day: str) -> None:
    with pytest.raises(UserError, match=r"^date must be a day, written YYYY-MM-DD, not ."):
        hf_chat_tokenizer(str(folder), chat_template=DATED, date=day)


def test_a_day_without_effect_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="does not read the clock; leave it out"):
        hf_chat_tokenizer(str(folder), date="2026-11-28")


@pytest.mark.parametrize("source", ["{{ [1, 2] | random }}", "{{ lipsum() }}"])
def test_a_template_that_draws_by_chance_is_refused(folder: Path, source: str) -> None:
    with pytest.raises(UserError, match=r"No filter named 'random'|'lipsum' is undefined"):
        hf_chat_tokenizer(str(folder), chat_template=source).tokenize_messages(CHAT)
