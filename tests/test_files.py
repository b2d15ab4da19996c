"""A file is whole or what it was before; digests and lines are what other tools make of them."""

import json
import subprocess
from pathlib import Path

import pytest

from emarecipes.errors import UserError
from emarecipes.export import main as export
from emarecipes.files import ended_lines, json_lines, sync, whole, write_json, write_text
from emarecipes.fingerprint import sha256
from emarecipes.output_dir import claim


def test_a_body_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "before")
    with pytest.raises(OSError, match="full"), whole(path) as partial:
        partial.write_text("half of what sh")
        raise OSError("full")
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("synced", [True, False])
def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path: Path, synced: bool) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")
    with whole(path, synced=synced) as partial:
        assert partial.parent == tmp_path and not partial.exists()
        partial.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_what_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".a.txt.partial").write_text("a longer text that was never finished")
    write_text(tmp_path / "a.txt", "Ä\n")
    assert (tmp_path / "a.txt").read_bytes() == b"\xc3\x84\n"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_nothing_is_written_where_no_folder_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "none/a.txt", "")
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "none")


def test_json_has_the_layout_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": "ä"})
    assert path.read_text() == '{\n  "a": "\\u00e4"\n}\n'
    write_json(path, {"a": "ä"}, indent=None, ensure_ascii=False)
    assert path.read_text(encoding="utf-8") == '{"a": "ä"}\n'


def test_lines_are_read_to_the_last_one_that_has_ended(tmp_path: Path) -> None:
    """JSON may hold line separators, which `str.splitlines` takes for the end of a line."""
    rows = [{"text": "one\u2028two\x85three\nfour"}, {"text": "ä"}]
    path = tmp_path / "a.jsonl"
    path.write_text(json_lines(rows) + '{"text": "cut o', encoding="utf-8")
    assert [json.loads(line) for line in ended_lines(path)] == rows
    path.write_bytes(b"")
    assert ended_lines(path) == []
    path.write_bytes(b"\xff")  # A character that was cut is not read either.
    assert ended_lines(path) == []


@pytest.mark.parametrize("size", [0, 5, 2**20, 3 * 2**20 + 1])
def test_sha256_is_sha256sums(tmp_path: Path, size: int) -> None:
    path, told = tmp_path / "a.bin", []
    path.write_bytes(bytes(range(256)) * (size // 256) + b"x" * (size % 256))
    said = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout
    assert sha256(path, told.append) == said.split()[0]
    assert sum(told) == size and len(told) == -(-size // 2**20)


def test_folders_that_are_not_there_and_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"output_dir: Not a directory: .*file/out"):
        claim(tmp_path / "file/out", "output_dir")
    assert export(["gguf", str(tmp_path), "--output", str(tmp_path / "none/a.gguf")]) == 1
    assert capsys.readouterr().err == f"error: --output: no such folder: {tmp_path / 'none'}\n"
