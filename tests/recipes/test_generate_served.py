"""Sampling served models, from a server of our own."""

import http.server
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import toy_select
from fake_judge import wait_for_nothing
from toy_generate import Case

from emarecipes.generation.served import base_urls


@pytest.fixture
def case(tmp_path: Path, toy_model_dir: Path) -> Case:
    return Case(tmp_path, toy_model_dir)


# --- a served model ----------------------------------------------------------------------------

COPIES = "prompts are the same"
LOCAL = ("~model", "~tokenizer", "~checkpointer")


@pytest.fixture
def server() -> Iterator[Any]:
    """An OpenAI-compatible server; `requests` are the bodies.

    `failing` makes it answer 401, `copies` the same at every seed.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found.requests.append(body)
            seed = 0 if found.copies else body["seed"]
            text = f"{seed}: {body['messages'][-1]['content']}"
            reason = "length" if "noun" in text else "content_filter" if "rain" in text else "stop"
            message = {"role": "assistant", "content": text}
            reply: Any = {
                "id": "x", "object": "chat.completion", "created": 0, "model": "toy",
                "choices": [{"index": 0, "finish_reason": reason, "message": message}],
                "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8},
            }  # fmt: skip
            if found.failing and len(found.requests) > 4:
                reply = {"error": {"message": "key secret-key-of-mine is wrong"}}
            data = json.dumps(reply).encode()
            self.send_response(401 if "error" in reply else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    found: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.requests, found.failing, found.copies = [], False, False
    thread = threading.Thread(target=found.serve_forever, args=(0.01,))
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


def use(server: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[tuple[str, ...], str]:
    """Overrides that sample from the server, and its address."""
    pytest.importorskip("inspect_ai")
    pytest.importorskip("openai")
    url = f"http://127.0.0.1:{server.server_port}/v1"
    monkeypatch.setenv("TOY_API_KEY", "secret-key-of-mine")
    monkeypatch.setenv("TOY_BASE_URL", url)
    return ("served=openai-api/toy/m", *LOCAL, "batch_size=1"), url


def test_an_openai_compatible_server(
    case: Case,
    server: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served, _ = use(server, monkeypatch)
    server.failing = True
    assert case.run(*served) == 1
    stderr = capsys.readouterr().err
    assert "error: the model openai-api/toy/m failed: " in stderr
    assert "secret-key" not in stderr
    assert not case.path().exists()
    server.failing = False
    server.requests.clear()
    assert case.run(*served) == 0
    assert len(server.requests) == 12 - 4, "answers of the failed run were kept"
    rows = toy_select.read_jsonl(case.path())
    assert len(rows) == 12
    assert len({row["answer"] for row in rows}) == 12, "every sample has a seed of its own"
    assert COPIES not in capsys.readouterr().out
    for row in rows:
        assert row["answer"].endswith(row["question"])
        cut = row["id"] in ("noun", "rain")  # By its length, and by the server's filter.
        assert (row["stop"], row["tokens"]) == ("length" if cut else "end", 3)
    request = next(r for r in server.requests if "noun" in r["messages"][-1]["content"])
    assert [message["role"] for message in request["messages"]] == ["system", "user"]
    assert (request["top_p"], request["temperature"]) == (0.95, 1.0)
    assert "secret-key" not in case.path().with_suffix(".json").read_text()


def test_a_server_that_does_not_sample_is_told(
    case: Case,
    server: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served, _ = use(server, monkeypatch)
    server.copies = True
    assert case.run(*served, "overwrite=true", "temperature=0.7") == 0
    assert f"{COPIES} at temperature 0.7: " in capsys.readouterr().out


@pytest.mark.parametrize("provider", ["vllm", "openai-api/toy"])
def test_a_models_own_sampling_defaults_do_not_hold(
    case: Case,
    server: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    provider: str,
) -> None:
    """Servers fill in what a request leaves out from the model's generation_config.json."""
    _, url = use(server, monkeypatch)
    monkeypatch.setenv("VLLM_BASE_URL", url)
    monkeypatch.setenv("VLLM_API_KEY", "x")
    assert case.run(f"served={provider}/m", *LOCAL, "top_p=1.0", "samples_per_paraphrase=1") == 0
    known = provider == "vllm"
    assert ("own top_k, min_p and repetition penalty hold" in capsys.readouterr().out) != known
    off = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    for request in server.requests:
        assert request["top_p"] == 1.0
        assert {key: request[key] for key in off if key in request} == (off if known else {})


def test_another_server_of_the_same_name_is_another_model(
    case: Case,
    server: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served, url = use(server, monkeypatch)
    server.failing = True
    assert case.run(*served) == 1
    capsys.readouterr()
    server.failing = False
    # Neither a key in the address nor a slash makes another server of it.
    monkeypatch.setenv("TOY_BASE_URL", url.replace("//", "//me:secret-key@") + "/?key=secret-key")
    assert base_urls("openai-api/toy/m") == [url]
    monkeypatch.setenv("TOY_BASE_URL", url + "/")
    assert case.run(*served) == 0
    assert len(toy_select.read_jsonl(case.path())) == 12
    more = "samples_per_paraphrase=4"
    monkeypatch.setenv("TOY_BASE_URL", "http://127.0.0.1:9/v1")
    assert "holds answers with other base_url" in case.error(capsys, *served, more)


def test_addresses_of_a_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.endswith("_BASE_URL"):
            monkeypatch.delenv(name)
    assert base_urls("vllm/some/model") == []
    monkeypatch.setenv("INSPECT_EVAL_MODEL_BASE_URL", "http://other:1/v1")
    monkeypatch.setenv("VLLM_BASE_URL", "http://Here:2/v1")
    monkeypatch.setenv("MY_SERVICE_BASE_URL", "http://my:3/v1")
    assert base_urls("vllm/some/model") == ["http://here:2/v1"]
    assert base_urls("openai-api/my-service/m") == ["http://my:3/v1"]
    assert base_urls("anthropic/m") == ["http://other:1/v1"]


def test_inspects_mock_model(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pytest.importorskip("inspect_ai.model")

    def output(messages: list[Any], *_: Any) -> Any:
        found = model.ModelOutput.from_content("mockllm/model", f"<{messages[-1].text}>")
        # Given, or the mock would fetch a tokenizer to count them.
        found.usage = model.ModelUsage(input_tokens=1, output_tokens=2, total_tokens=3)
        return found

    get_model = model.get_model
    monkeypatch.setattr(
        model, "get_model", lambda name, **kw: get_model(name, custom_outputs=output, **kw)
    )
    assert case.run("served=mockllm/model", *LOCAL) == 0
    rows = toy_select.read_jsonl(case.path())
    assert [row["answer"] for row in rows] == [f"<{row['question']}>" for row in rows]
    assert {(row["stop"], row["tokens"]) for row in rows} == {("end", 2)}


def test_a_server_that_is_asked_on_two_days_is_told(
    case: Case,
    server: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its clock is in the prompts where its template prints the day; we cannot see the template."""
    served, _ = use(server, monkeypatch)
    wait_for_nothing(monkeypatch)
    days = []
    for day, failing in (("2026-11-28", True), ("2026-11-28", True), ("2026-11-29", False)):
        monkeypatch.setattr("emarecipes.generation.run.today", lambda day=day: day)
        server.failing = failing
        server.requests.clear()
        assert case.run(*served) == int(failing)
        days.append(json.loads((case.output / "answers/asked.json").read_text())["asked_on"])
        told = "asked on 2026-11-28 and 2026-11-29" in capsys.readouterr().out
        assert told != failing
    assert days == [["2026-11-28"]] * 2 + [["2026-11-28", "2026-11-29"]]
