"""A small OpenAI-compatible server on this machine, whose replies a test decides."""

import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tenacity

JUDGE, SECRET = "openai-api/fake/judge", "sk-very-secret-123456"


@dataclass
class Call:
    """One call, from 1, as the server saw it."""

    number: int
    prompt: str
    body: dict[str, Any]
    key: str


@dataclass
class FakeJudge:
    """What to reply: a text, (text, probabilities of its one token), a choice, an HTTP status.

    A status may come with its error's text: (400, "no such parameter").
    """

    reply: Callable[[Call], str | tuple[str, dict[str, float]] | dict[str, Any] | int]
    url: str = ""
    calls: list[Call] = field(default_factory=list)
    stop_listening: Callable[[], object] = lambda: None


@contextmanager
def serve(reply: Callable[[Call], Any]) -> Iterator[FakeJudge]:
    judge, lock = FakeJudge(reply), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                prompt = body["messages"][-1]["content"]
                key = self.headers.get("Authorization", "")
                call = Call(len(judge.calls) + 1, prompt, body, key)
                judge.calls.append(call)
            found = judge.reply(call)
            if isinstance(found, int):
                found = found, "content filter" if found in (400, 403) else "busy"
            failed = isinstance(found, tuple) and isinstance(found[0], int)
            text = json.dumps({"error": {"message": found[1]}} if failed else _completion(found))
            status = found[0] if failed else 200
            with suppress(ConnectionError):  # A client that no longer waits.
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def stop_listening() -> None:
        server.shutdown()
        server.socket.close()

    judge.stop_listening = stop_listening
    judge.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def cut(text: str) -> dict[str, Any]:
    """A choice whose text was cut by `max_tokens`."""
    return {"message": {"role": "assistant", "content": text}, "finish_reason": "length"}


def in_tokens(text: str, *tokens: tuple[str, dict[str, float]]) -> dict[str, Any]:
    """A choice whose tokens, with the likeliest in their places, may hold more than its text."""
    content = [
        {"token": token, "logprob": -0.5, "bytes": None}
        | {
            "top_logprobs": [
                {"token": other, "logprob": math.log(p), "bytes": None}
                for other, p in probabilities.items()
            ]
        }
        for token, probabilities in tokens
    ]
    message = {"role": "assistant", "content": text}
    return {"message": message, "logprobs": {"content": content, "refusal": None}}


def _completion(found: str | tuple[str, dict[str, float]] | dict[str, Any]) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
    text, probabilities = found if isinstance(found, tuple) else (found, None)
    choice |= found if isinstance(found, dict) else {}
    choice.setdefault("message", {"role": "assistant", "content": text})
    if probabilities is not None:
        tops = [
            {"token": token, "logprob": math.log(p), "bytes": None}
            for token, p in probabilities.items()
        ]
        own = {"token": text, "logprob": math.log(probabilities[text]), "bytes": None}
        choice["logprobs"] = {"content": [own | {"top_logprobs": tops}], "refusal": None}
    usage = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "fake"} | {
        "choices": [choice],
        "usage": usage,
    }


def set_up_client(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """An empty cache, the key of `JUDGE`, and no waits of seconds that double between attempts."""
    monkeypatch.setenv("INSPECT_CACHE_DIR", str(cache))
    monkeypatch.setenv("FAKE_API_KEY", SECRET)
    wait_for_nothing(monkeypatch)


def wait_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two attempts of Inspect's to reach a model."""
    name = "inspect_ai.model._retry.wait_exponential_jitter"
    monkeypatch.setattr(name, lambda **_: tenacity.wait_none())
