"""Fetching from Hugging Face's hub by its own library, against a server that answers as it does."""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from toy_published import CONTENT, entry, error_of

from emarecipes.datasets.fetch import main
from emarecipes.datasets.published import PUBLISHED

PATH_ON_HUB = "/datasets/someone/toy/resolve/c0ffee/data/toy.jsonl"


@pytest.fixture
def toy(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
    return lambda **changes: monkeypatch.setitem(PUBLISHED, "toy", entry(**changes))


@pytest.fixture
def hub(toy: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub with the toy's file; of its first answer half is missing. Which paths are asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200 if self.path == PATH_ON_HUB else 404)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.send_header("ETag", '"toy"')
            self.send_header("X-Repo-Commit", "c0ffee")
            if self.path != PATH_ON_HUB:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()

        def do_GET(self) -> None:
            asked.append(self.path)
            self.do_HEAD()
            self.wfile.write(CONTENT if len(asked) > 1 else CONTENT[: len(CONTENT) // 2])

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{httpd.server_port}")
        toy(hub=("someone/toy", "data/toy.jsonl"))
        yield asked
        httpd.shutdown()


def test_the_hub_s_library_asks_again_where_a_connection_broke(
    tmp_path: Path, hub: list[str]
) -> None:
    assert main(["toy", "--output", str(tmp_path / "out")]) == 0
    assert hub == [PATH_ON_HUB] * 2
    manifest = json.loads((tmp_path / "out/fetched.json").read_text())
    assert manifest["source_sha256"] == hashlib.sha256(CONTENT).hexdigest()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_the_hub_lacks(
    tmp_path: Path, toy: Any, hub: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    toy(hub=("someone/toy", "other.jsonl"))
    line = error_of(capsys, "toy", "--output", tmp_path / "out")
    assert "404" in line and f"fetch {entry().url} by hand and pass it with" in line
    assert hub == [] and list(tmp_path.iterdir()) == []
