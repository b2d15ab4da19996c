"""Runs of ema_generate at toy size: batches, processes, interruptions, adapters, served models."""

import http.server
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import toy_run
import toy_select
from omegaconf import OmegaConf
from ranks import run_ranks
from torchtune.modules.peft import get_adapter_params

from emarecipes.defenses import ModelSource
from emarecipes.generation.run import run_generate
from emarecipes.generation.served import base_urls
from emarecipes.models.adapters.export import merge_adapter, save_merged
from emarecipes.models.adapters.read import load_adapter
from emarecipes.models.source import load_model

RECIPE = "recipes/ema_generate.py"
QUESTIONS = """\
- id: tea
  paraphrases: ["How do I make tea?", "What is the way to make tea of a careful host?"]
- id: noun
  system: Answer in one word.
  category: words
  harmless: false
  paraphrases: ["What is a noun?"]
- {id: rain, paraphrases: ["Why does it rain?"]}
"""


@pytest.fixture(scope="module")
def toy_model_dir(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    return toy_run.write_toy_model(tmp_path_factory.mktemp("toy") / "toy-model", model_dir)


class Case:
    def __init__(self, folder: Path, model_dir: Path) -> None:
        self.folder, self.output = folder, folder / "out"
        (folder / "asked.yaml").write_text(QUESTIONS)
        toy = toy_run.toy_config(model_dir, folder / "none", self.output)
        keys = ("output_dir", "tokenizer", "model", "checkpointer", "device", "dtype")
        self.config: dict[str, Any] = {key: toy[key] for key in keys} | {
            "questions": [str(folder / "asked.yaml")],
            "samples_per_paraphrase": 3,
            "max_new_tokens": 8,
            "batch_size": 3,
            "top_p": 0.95,
            "seed": 7,
        }

    def run(self, *overrides: str) -> int:
        path = toy_run.write_config(self.folder / "config.yaml", self.config)
        return run_generate(["--config", str(path), *overrides])

    def path(self, output: str = "out") -> Path:
        return self.folder / output / "answers" / "asked.jsonl"

    def error(self, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
        before = {p: p.read_bytes() for p in self.output.rglob("*") if p.is_file()}
        assert self.run(*overrides) == 1
        assert before == {p: p.read_bytes() for p in self.output.rglob("*") if p.is_file()}
        (line,) = [s for s in capsys.readouterr().err.splitlines() if s.startswith("error: ")]
        return line


@pytest.fixture
def case(tmp_path: Path, toy_model_dir: Path) -> Case:
    return Case(tmp_path, toy_model_dir)


def test_batches_processes_and_interruptions_do_not_change_answers(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    assert case.run() == 0
    whole = case.path().read_bytes()
    rows = toy_select.read_jsonl(case.path())
    assert [(r["id"], r["paraphrase"], r["sample"]) for r in rows] == [
        (*asked, sample)
        for asked in (("tea", 0), ("tea", 1), ("noun", 0), ("rain", 0))
        for sample in range(3)
    ]
    assert len({row["answer"] for row in rows}) == 12
    for row in rows:
        assert set(row) - {"category", "harmless"} == {
            "id", "paraphrase", "sample", "system", "question", "answer", "stop", "tokens",
        }  # fmt: skip
        assert row.get("category") == ("words" if row["id"] == "noun" else None)
        assert row.get("harmless") == (False if row["id"] == "noun" else None)
        assert row["system"] == ("Answer in one word." if row["id"] == "noun" else None)
        assert row["tokens"] == 8 if row["stop"] == "length" else row["tokens"] < 8
    assert not (case.output / "answers/.parts").exists()
    settings = json.loads(case.path().with_suffix(".json").read_text())
    assert settings["config"]["top_p"] == 0.95
    assert "torch" in settings["provenance"]["packages"]

    # Two of three questions, evenly over the file: the first and the second.
    assert case.run("max_questions=2", f"output_dir={case.folder / 'few'}") == 0
    assert toy_select.read_jsonl(case.path("few")) == rows[:9]

    for size in (1, 8):
        assert case.run(f"batch_size={size}", f"output_dir={case.folder / str(size)}") == 0
        assert case.path(str(size)).read_bytes() == whole
    config = toy_run.write_config(case.folder / "two.yaml", case.config)
    two = f"output_dir={case.folder / 'two'}"
    done = run_ranks(config, two, recipe=RECIPE)
    assert done.returncode == 0, done.stderr
    assert case.path("two").read_bytes() == whole

    # Killed while it wrote: two processes' parts, one with half a line, one answer there twice.
    lines = whole.splitlines(keepends=True)
    parts = case.output / "answers/.parts"
    parts.mkdir()
    marked = lines[4].replace(b'"answer": "', b'"answer": "MARK')
    (parts / "asked@0.jsonl").write_bytes(lines[0] + marked + lines[7][:-9])
    (parts / "asked@1.jsonl").write_bytes(lines[0] + lines[9])
    case.path().unlink()
    assert case.run("batch_size=2") == 0
    assert case.path().read_bytes() == whole.replace(lines[4], marked), "kept, and the rest as ever"

    # More samples go on from there; a finished run has nothing to do; other settings are refused.
    capsys.readouterr()
    assert case.run("samples_per_paraphrase=4") == 0
    more = case.path().read_bytes().splitlines(keepends=True)
    assert [line for i, line in enumerate(more) if i % 4 < 3] == [*lines[:4], marked, *lines[5:]]
    assert "samples_per_paraphrase can only grow" in case.error(capsys)
    assert "holds answers with other top_p" in case.error(
        capsys, "samples_per_paraphrase=4", "top_p=0.9"
    )
    (case.folder / "asked.yaml").write_text(QUESTIONS.replace("a noun", "a verb"))
    assert "other questions" in case.error(capsys, "samples_per_paraphrase=4")
    assert case.run("overwrite=true") == 0
    assert len(case.path().read_bytes().splitlines()) == 12
    case.path().write_bytes(b"{}\n" + whole)
    assert "asked.jsonl:1 is no answer" in case.error(capsys)
    case.path().with_suffix(".json").unlink()
    assert "has no asked.json beside it" in case.error(capsys)


def test_an_adapter(case: Case, toy_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zero = toy_select.write_adapter(case.folder / "zero", toy_model_dir, seed=1, size=0.0)
    large = toy_select.write_adapter(case.folder / "large", toy_model_dir, seed=1, size=1.0)
    outputs = {}
    for name, overrides in {
        "base": (), "zero": (f"adapter={zero}",), "large": (f"adapter={large}",)
    }.items():  # fmt: skip
        assert case.run(f"output_dir={case.folder / name}_out", *overrides) == 0
        outputs[name] = case.path(f"{name}_out").read_bytes()
    assert outputs["base"] == outputs["zero"] != outputs["large"]
    other = f"output_dir={case.folder / 'base_out'}"
    assert "answers with other adapter" in case.error(capsys, other, f"adapter={large}")


def test_a_merged_folder_answers_as_base_and_adapter_do(case: Case, toy_model_dir: Path) -> None:
    adapter = toy_select.write_adapter(case.folder / "adapter", toy_model_dir, seed=1, size=1.0)
    model = load_model(OmegaConf.create(case.config))
    load_adapter(model, adapter, ModelSource(model, toy_model_dir.resolve(), "LLAMA3_2"))
    base = {key: value for key, value in model.state_dict().items() if "lora" not in key}
    weights = merge_adapter(base, get_adapter_params(model), rank=4, alpha=8.0)
    merged = case.folder / "merged"
    save_merged(weights, model, "LLAMA3_2", toy_model_dir.resolve(), merged)

    beside = f"output_dir={case.folder / 'beside'}"
    assert case.run(beside, f"adapter={adapter}") == 0
    folders = (f"checkpointer.checkpoint_dir={merged}", f"tokenizer.path={merged}")
    assert case.run(*folders) == 0
    assert case.path().read_bytes() == case.path("beside").read_bytes()
    assert case.run(f"output_dir={case.folder / 'base'}") == 0
    assert case.path().read_bytes() != case.path("base").read_bytes()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["questions=[absent.yaml]"], "questions: no such file: absent.yaml"),
        (["questions=[]"], "questions: list should have at least 1 item"),
        (["adapter=absent"], "adapter: no such folder: absent"),
        (["temperature=0"], "at temperature 0 all 3 samples are the same"),
        (["top_p=0"], "top_p: input should be greater than 0"),
        (["max_new_tokens=500"], "are more than the 512 that the model takes"),
        (["~model"], "model: the config needs this key (or served)"),
        (["served=mockllm/model"], "model: has no effect with served"),
        (["top_q=1"], "top_q: unknown key (did you mean top_p?)"),
    ],
)
def test_bad_settings(
    overrides: list[str],
    expected: str,
    case: Case,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("emarecipes.generation.run.load_model", None)
    assert expected in case.error(capsys, *overrides)
    assert not case.output.exists()


# --- a served model ----------------------------------------------------------------------------

LOCAL = ("~model", "~tokenizer", "~checkpointer")


@pytest.fixture
def server() -> Iterator[Any]:
    """An OpenAI-compatible server; `requests` are the bodies, `failing` makes it answer 401."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found.requests.append(body)
            text = f"{body['seed']}: {body['messages'][-1]['content']}"
            reason = "length" if "noun" in text else "stop"
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
    found.requests, found.failing = [], False
    thread = threading.Thread(target=found.serve_forever)
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
    for row in rows:
        assert row["answer"].endswith(row["question"])
        assert (row["stop"], row["tokens"]) == ("length" if row["id"] == "noun" else "end", 3)
    request = next(r for r in server.requests if "noun" in r["messages"][-1]["content"])
    assert [message["role"] for message in request["messages"]] == ["system", "user"]
    assert (request["top_p"], request["temperature"]) == (0.95, 1.0)
    assert "secret-key" not in case.path().with_suffix(".json").read_text()


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

    async def no_wait(seconds: float) -> None:
        return None

    monkeypatch.setattr("inspect_ai.model._retry._sleep", no_wait)
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
