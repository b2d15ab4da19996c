"""Servers that are not there, and what of an HTTP error is about the prompt."""

import socket
import time
from pathlib import Path

import pytest
from fake_judge import JUDGE, serve, set_up_client
from omegaconf import OmegaConf

from emarecipes import provider
from emarecipes.errors import UserError
from emarecipes.generation.answers import AnswerKey, Asked
from emarecipes.generation.served import answer_served
from emarecipes.judges.calls import ask, check_judge


@pytest.fixture(autouse=True)
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_up_client(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr(provider, "_BETWEEN", 0.2)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def test_a_judge_whose_server_is_not_there_is_named_with_its_address(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()  # Inspect waits for seconds between attempts, as it does.
    port = free_port()
    name = "openai-api/absent/judge"
    monkeypatch.setenv("ABSENT_API_KEY", "key")
    monkeypatch.setenv("ABSENT_BASE_URL", f"http://127.0.0.1:{port}/v1")
    monkeypatch.setenv("INSPECT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(provider, "_BETWEEN", 0.2)
    begun = time.monotonic()
    with pytest.raises(UserError) as error:
        ask(name, ["one", "two"], progress=lambda n: None)
    assert str(error.value).startswith(
        f"the judge {name} failed: no server answers at 127.0.0.1:{port} ("
    )
    assert "refused" in str(error.value)
    assert time.monotonic() - begun < 20


def test_a_served_model_that_goes_while_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had answered is handed over."""
    cfg = OmegaConf.create(
        {"served": JUDGE, "seed": 0, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 4}
        | {"batch_size": 1}
    )
    asked = [Asked(AnswerKey("q", 0, sample), "why?", None, None, None) for sample in range(3)]
    answered: list[object] = []
    with serve(lambda call: "an answer") as server:
        monkeypatch.setenv("FAKE_BASE_URL", server.url)

        def done(record: object) -> None:
            answered.append(record)
            server.stop_listening()

        with pytest.raises(UserError, match=r"no server answers at 127\.0\.0\.1:\d+ \("):
            answer_served(cfg, asked, done)
    assert len(answered) == 1


def test_a_judge_is_asked_where_the_environment_says_by_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAKE_BASE_URL", f"http://127.0.0.1:{free_port()}/v1")
    check_judge(JUDGE)
    with serve(lambda call: "80") as server:
        monkeypatch.setenv("FAKE_BASE_URL", server.url)
        assert [r.score for r in ask(JUDGE, ["one"], progress=lambda n: None)] == [80]


def test_replies_from_the_cache_need_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider, "_BETWEEN", 4.0)  # As it is: the first reply may take a second.
    prompts = ["one", "two"]
    with serve(lambda call: "80") as server:
        monkeypatch.setenv("FAKE_BASE_URL", server.url)
        assert [r.score for r in ask(JUDGE, prompts, progress=lambda n: None)] == [80, 80]
    assert [r.score for r in ask(JUDGE, prompts, progress=lambda n: None)] == [80, 80]


@pytest.mark.parametrize(
    ("status", "said", "refusal"),
    [
        (400, "The prompt triggered our content management policy", True),
        (403, "Input was flagged by moderation", True),
        (400, "This model's maximum context length is 2048 tokens", True),
        (413, "Request too large", True),
        (400, "unknown parameter top_logprobs", False),
        (400, "model: no such adapter", False),
        (422, "body.messages.0.name: field required", False),
    ],
)
def test_what_of_an_error_is_about_the_prompt(
    monkeypatch: pytest.MonkeyPatch, status: int, said: str, refusal: bool
) -> None:
    """What is about the request is no refusal: it would leave prompts out for a mistake of ours."""
    refused: dict[str, str] = {}
    with serve(lambda call: (status, said) if call.prompt == "bad" else "80") as server:
        monkeypatch.setenv("FAKE_BASE_URL", server.url)
        if refusal:
            replies = ask(JUDGE, ["bad", "good"], progress=lambda n: None, refused=refused)
            assert [reply.kind for reply in replies] == ["failed", "score"]
            assert said in refused["bad"]
        else:
            with pytest.raises(UserError, match=said):
                ask(JUDGE, ["bad", "good"], progress=lambda n: None, refused=refused)
            assert not refused
