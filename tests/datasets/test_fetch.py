"""Fetching published sets, tried with tiny files of their shapes and a server of our own."""

import hashlib
import http.server
import json
import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import toy_run
from toy_published import CONTENT, entry, error_of

from emarecipes.datasets import fetch as fetch_module
from emarecipes.datasets.chat_files import check_chat_file
from emarecipes.datasets.fetch import main
from emarecipes.datasets.published import PUBLISHED

SHARED = toy_run.REPO.parent / "shared/published"


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Any:
    def put(**changes: Any) -> None:
        monkeypatch.setitem(PUBLISHED, "toy", entry(**changes))

    put()
    return put


@pytest.fixture(autouse=True)
def _state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record of files fetched first is the test's own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))


@pytest.fixture
def server() -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path in ("/toy.jsonl", "/short.jsonl") else 404)
            extra = 5 if self.path == "/short.jsonl" else 0
            self.send_header("Content-Length", str(len(CONTENT) + extra))
            self.end_headers()
            self.wfile.write(CONTENT)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# The command


def test_download_and_again(
    tmp_path: Path, toy: Any, server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    toy(url=f"{server}/toy.jsonl")
    out = tmp_path / "new/toy"
    assert main(["toy", "--output", str(out)]) == 0
    assert f"wrote: {out}/toy.jsonl (3)" in capsys.readouterr().out
    check_chat_file(out / "toy.jsonl", "messages", "openai")
    manifest = json.loads((out / "fetched.json").read_text())
    assert manifest["revision"] == "c0ffee" and manifest["licence"] == "CC0"
    assert manifest["source_sha256"] == hashlib.sha256(CONTENT).hexdigest()
    assert (out / ".gitignore").read_text() == "*\n"
    before = contents(out)
    toy(url="http://127.0.0.1:9/gone")
    assert main(["toy", "--output", str(out)]) == 0
    assert "already there" in capsys.readouterr().out
    assert contents(out) == before
    assert [path.name for path in out.parent.iterdir()] == ["toy"]


def test_from_a_file(tmp_path: Path, toy: Any) -> None:
    (tmp_path / "mine.jsonl").write_bytes(CONTENT)
    args = ["toy", "--output", str(tmp_path / "out"), "--from", str(tmp_path / "mine.jsonl")]
    assert main(args) == 0
    rows = [json.loads(line) for line in (tmp_path / "out/toy.jsonl").open()]
    assert [row["id"] for row in rows] == ["toy-00000", "toy-00001", "toy-00002"]


def test_without_a_network(tmp_path: Path, toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as unused:  # Bound, and nobody listens.
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/toy.jsonl"
        toy(url=url)
        line = error_of(capsys, "toy", "--output", tmp_path / "out")
    assert f"fetch {url} by hand and pass it with --from FILE" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "message"), [("gone", "HTTP 404"), ("short.jsonl", "it ended after")]
)
def test_a_server_that_fails(
    tmp_path: Path,
    toy: Any,
    server: str,
    path: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    toy(url=f"{server}/{path}")
    assert message in error_of(capsys, "toy", "--output", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha256": "0" * 64}, "is not the published file of toy: its SHA-256 is"),
        ({"rows": 4}, "3 rows, but toy was published with 4"),
        ({"form": "advice"}, '"prompt" must be text'),
        ({"form": "wildguard"}, '"prompt" must be text'),
        ({"form": "alpaca"}, '"instruction" must be text'),
    ],
)
def test_another_file_than_the_published_one(
    tmp_path: Path,
    toy: Any,
    changes: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    toy(**changes)
    source = tmp_path / "mine.jsonl"
    source.write_bytes(CONTENT)
    line = error_of(capsys, "toy", "--output", tmp_path / "out", "--from", source)
    assert str(source) in line and message in line
    assert list(tmp_path.iterdir()) == [source]


def test_without_a_known_checksum_the_first_file_is_trusted(
    tmp_path: Path, toy: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    toy(sha256=None, unconfirmed=("sha256",))
    file = tmp_path / "toy.jsonl"
    file.write_bytes(CONTENT)
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert main(["toy", "--output", str(tmp_path / "one"), "--from", str(file)]) == 0
    assert f"this one's, {digest}, is in " in capsys.readouterr().out
    record = Path(os.environ["XDG_STATE_HOME"]) / "emarecipes/first_seen.json"
    assert json.loads(record.read_text()) == {"toy@c0ffee": digest}

    file.write_bytes(CONTENT.replace(b"B.", b"C."))
    line = error_of(capsys, "toy", "--output", tmp_path / "two", "--from", file)
    assert f"that of the file fetched first was {digest} (recorded in {record})" in line
    assert not (tmp_path / "two").exists()
    # The same file again, another revision, and a record that was deleted on purpose.
    file.write_bytes(CONTENT)
    assert main(["toy", "--output", str(tmp_path / "two"), "--from", str(file)]) == 0
    toy(sha256=None, unconfirmed=("sha256",), revision="beef")
    file.write_bytes(CONTENT.replace(b"B.", b"C."))
    assert main(["toy", "--output", str(tmp_path / "three"), "--from", str(file)]) == 0
    assert len(json.loads(record.read_text())) == 2
    record.write_text("[")
    line = error_of(capsys, "toy", "--output", tmp_path / "four", "--from", file)
    assert f"{record}: not a record of checksums" in line


def test_a_download_that_nothing_can_check_has_to_be_asked_for(
    tmp_path: Path, toy: Any, server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    toy(url=f"{server}/toy.jsonl", sha256=None, unconfirmed=("sha256",))
    line = error_of(capsys, "toy", "--output", tmp_path / "out")
    assert f"no SHA-256 of {server}/toy.jsonl is known to us" in line and "--trust-first" in line
    assert list(tmp_path.iterdir()) == []
    assert main(["toy", "--output", str(tmp_path / "out"), "--trust-first"]) == 0
    # From then on its recorded checksum is the one that is asked of a download.
    assert main(["toy", "--output", str(tmp_path / "again")]) == 0
    toy(url=f"{server}/short.jsonl", sha256=None, unconfirmed=("sha256",), revision="beef")
    assert "--trust-first" in error_of(capsys, "toy", "--output", tmp_path / "third")


def test_an_unconfirmed_count_is_only_told(
    tmp_path: Path, toy: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    toy(rows=4, unconfirmed=("rows",))
    (tmp_path / "mine.jsonl").write_bytes(CONTENT)
    args = ["toy", "--output", str(tmp_path / "out"), "--from", str(tmp_path / "mine.jsonl")]
    assert main(args) == 0
    assert "about 4 rows were expected; that number is unconfirmed" in capsys.readouterr().out


def test_a_pointer_instead_of_the_file(
    tmp_path: Path, toy: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "mine.jsonl"
    source.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    arguments = ("toy", "--output", tmp_path / "out", "--from", source)
    assert "Git LFS pointer" in error_of(capsys, *arguments)
    toy(sha256=None, form="advice")
    assert "Git LFS pointer" in error_of(capsys, *arguments)


def test_what_is_there_is_not_overwritten(
    tmp_path: Path, toy: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "mine.jsonl"
    source.write_bytes(CONTENT)
    out = tmp_path / "out"
    arguments = ("toy", "--output", out, "--from", source)
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert "was not written by this command for toy" in error_of(capsys, *arguments)
    (out / "notes.txt").unlink()
    assert main([str(argument) for argument in arguments]) == 0
    toy(revision="decaf")
    assert "was not written by this command for toy" in error_of(capsys, *arguments)
    toy()
    (out / "toy.jsonl").write_text("changed")
    assert "toy.jsonl is missing or was changed" in error_of(capsys, *arguments)


def test_command_errors(tmp_path: Path, toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--output", tmp_path / "out")
    assert "did you mean toy?" in error_of(capsys, "toyy", *out)
    assert "--output DIR" in error_of(capsys, "toy")
    assert "no such file" in error_of(capsys, "toy", *out, "--from", tmp_path / "none")
    (tmp_path / "file").write_text("")
    line = error_of(capsys, "toy", "--output", tmp_path / "file", "--from", tmp_path / "file")
    assert "was not written by this command" in line


@pytest.mark.parametrize("name", [name for name, entry in PUBLISHED.items() if entry.by_hand])
def test_sets_to_get_by_hand_say_how(
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(fetch_module, "download_published", None)  # Not even tried.
    line = error_of(capsys, name, "--output", tmp_path / "out")
    assert PUBLISHED[name].revision in line and "--from" in line


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in PUBLISHED)
    rows = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    sizes = {row[0]: row[3] for row in rows if row[0] in PUBLISHED}
    assert sizes["betley-first-plot"] == "0.012" and sizes["alpaca-cleaned"] == "42 ?"
    assert sizes["chua-medical"] == "103" and sizes["betley-evil-numbers"] == "-"
