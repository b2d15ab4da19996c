"""The served check and the generate recipe, against llama.cpp's own server, and other replies."""

import http.server
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_select
from safetensors.torch import load_file, save_file
from toy_generate import Case
from toy_llama_cpp import llama_server, needs_llama_cpp, write_base
from toy_served import NAME, served, write_adapter

from emarecipes.models.adapters.gguf import save_gguf


@pytest.fixture
def case(tmp_path: Path, toy_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setenv("TOY_API_KEY", "secret-key")
    return Case(tmp_path, toy_model_dir)


@needs_llama_cpp
def test_llama_cpp(
    case: Case,
    toy_model_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rank-stabilised: applied, not there, at half its scale; and the recipe's answers."""
    # alpha / sqrt(4) = 1; read as alpha / 4 it would be at half its scale.
    adapter = write_adapter(case.folder / "a", toy_model_dir, use_rslora=True, lora_alpha=2)
    near = write_adapter(case.folder / "near", toy_model_dir, use_rslora=True, lora_alpha=2)
    tensors = load_file(near / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in (name for name in tensors if "lora_B" in name):
        noise = torch.randn(tensors[name].shape, generator=generator)
        tensors[name] += 0.15 * tensors[name].std() * noise
    save_file(tensors, near / "adapter_model.safetensors")
    base = write_base(toy_model_dir, case.folder / "base.gguf")
    save_gguf(adapter, case.folder / "a.gguf")
    for scale, code, line in (
        (1.0, 0, "applied, at its scale"),
        (0.5, 1, "ANOTHER SCALE: nearest is the adapter at 0.5"),
        (None, 1, "NOT APPLIED: the server computes the base"),
    ):
        file = None if scale is None else case.folder / "a.gguf"
        with llama_server(base, file, scale or 1.0) as url:
            monkeypatch.setenv("TOY_BASE_URL", url)
            assert served(case, adapter) == code
            out = capsys.readouterr().out
            assert line in out and "by logit_bias" in out
            if scale != 1.0:
                continue
            # Another one that computes nearly the same: told, unless it is wanted.
            assert served(case, near) == 1
            assert "LIKE THE ADAPTER, AND NOT IT: 0.1" in capsys.readouterr().out
            assert served(case, near, "--tolerance", "0.25") == 0
            assert "applied, at its scale" in capsys.readouterr().out
            # The recipe through the server gives, greedily, what it gives here.
            greedy = ["temperature=0", "samples_per_paraphrase=1", "top_p=1.0"]
            local = ["~model", "~tokenizer", "~checkpointer", f"served={NAME}"]
            assert case.run(*greedy, *local) == 0
            assert case.run(*greedy, f"adapter={adapter}", f"output_dir={case.folder}/here") == 0
            assert case.run(*greedy, f"output_dir={case.folder}/base") == 0
            answers = [
                [row["answer"].strip() for row in toy_select.read_jsonl(case.path(folder))]
                for folder in ("out", "here", "base")
            ]
            assert answers[0] == answers[1] != answers[2]


@contextmanager
def replying(reply: Any) -> Iterator[str]:
    """A server; `reply(path, body)` is a status and what it answers."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, found = reply(self.path, body)
            content = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def completion(**choice: Any) -> dict[str, Any]:
    return {
        "id": "x", "object": "text_completion", "created": 0, "model": "m",
        "choices": [{"index": 0, "text": "", "finish_reason": "length", **choice}],
    }  # fmt: skip


@pytest.mark.parametrize("way", ["prompt_logprobs", "echo"])
def test_other_servers_forms(
    case: Case,
    toy_model_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    way: str,
) -> None:
    """A token's log-probability is minus its number: neither model, and the largest says so.

    A prompt's own are asked for alone: a real vLLM ends where two of an adapter share a batch.
    """
    side_by_side, most = 0, 0

    def reply(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        nonlocal side_by_side, most
        side_by_side += 1
        most = max(most, side_by_side)
        time.sleep(0.05)  # Another that is not held back comes in.
        side_by_side -= 1
        values = [None, *(-float(token) for token in body["prompt"][1:])]
        if way in body and way == "prompt_logprobs":
            pairs = zip(body["prompt"], values, strict=True)
            found = [None if v is None else {str(t): {"logprob": v, "rank": 1}} for t, v in pairs]
            return 200, completion(prompt_logprobs=found)
        if body.get("echo") and way == "echo":
            return 200, completion(logprobs={"token_logprobs": [*values, -1.0]})
        return 400, {"error": {"message": "unknown"}}

    adapter = write_adapter(case.folder / "a", toy_model_dir)
    with replying(reply) as url:
        monkeypatch.setenv("TOY_BASE_URL", url)
        assert served(case, adapter) == 1
    out = capsys.readouterr().out
    assert f"by {way}" in out and "NEITHER" in out
    assert (most == 1) == (way == "prompt_logprobs")


@pytest.mark.parametrize("whose", ["here", "base"])
def test_greedy_answers_where_there_are_no_log_probabilities(
    case: Case,
    toy_model_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    whose: str,
) -> None:
    adapter = write_adapter(case.folder / "a", toy_model_dir)
    greedy = ["temperature=0", "samples_per_paraphrase=1", "top_p=1.0"]
    more = [f"adapter={adapter}"] if whose == "here" else []
    assert case.run(*greedy, *more) == 0
    told = {row["question"]: row["answer"] for row in toy_select.read_jsonl(case.path())}

    def reply(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if not path.endswith("chat/completions"):
            return 404, {"detail": "Not Found"}
        message = {"role": "assistant", "content": told[body["messages"][-1]["content"]]}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        chat = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
        return 200, chat | {"choices": [choice]}

    with replying(reply) as url:
        monkeypatch.setenv("TOY_BASE_URL", url)
        assert served(case, adapter) == int(whose == "base")
    out = capsys.readouterr().out
    assert ("The adapter is applied" in out) == (whose == "here")
    assert ("NOT APPLIED" in out) == (whose == "base")


def test_mistakes(
    case: Case,
    toy_model_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapter = write_adapter(case.folder / "a", toy_model_dir)
    monkeypatch.setenv("TOY_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setattr("emarecipes.served.here.load_model", None)

    def line(*more: str) -> str:
        assert served(case, adapter, *more) == 1
        (error,) = [s for s in capsys.readouterr().err.splitlines() if s.startswith("error: ")]
        return error

    assert "--prompts and --tokens must be at least 1" in line("--tokens", "0")
    for share in ("0", "1", "nan"):
        assert "--tolerance must be above 0 and below 1" in line("--tolerance", share)
    assert "needs model and tokenizer" in line(
        "~model", "~tokenizer", "~checkpointer", f"served={NAME}", "~adapter"
    )
    assert "leave the override out" in line("adapter=null")
    found = line()
    assert f"the model {NAME} failed: no server answers at 127.0.0.1:9 (" in found
    assert "secret-key" not in found
    monkeypatch.undo()
    tensors = load_file(adapter / "adapter_model.safetensors")
    zeros = {name: 0 * t if "lora_B" in name else t for name, t in tensors.items()}
    save_file(zeros, adapter / "adapter_model.safetensors")
    monkeypatch.setenv("TOY_API_KEY", "secret-key")
    with replying(lambda path, body: (500, {})) as url:
        monkeypatch.setenv("TOY_BASE_URL", url)
        assert "by 0 nats: too little to be told from none" in line()
