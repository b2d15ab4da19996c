"""A digest of parts of a file is another one wherever a matrix of it, or any text, is."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from emarecipes.comparison.arms import fingerprint
from emarecipes.fingerprint import sampled_digest

MIB = 2**20


@pytest.mark.parametrize("name", ["model.safetensors", "rows.jsonl"])
def test_a_change_in_the_middle(tmp_path: Path, name: str) -> None:
    """As of a base into which an adapter of its middle layers was merged, embeddings untouched."""
    path = tmp_path / name
    content = bytearray(8 * MIB)
    path.write_bytes(content)
    before = sampled_digest([path])
    assert sampled_digest([path]) == before
    content[3 * MIB : 3 * MIB + 2**17] = b"x" * 2**17
    path.write_bytes(content)
    assert sampled_digest([path]) != before


def test_one_byte_of_a_data_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"a" * 6 * MIB)
    before = sampled_digest([path])
    with path.open("r+b") as file:
        file.seek(3 * MIB + 1)
        file.write(b"b")
    assert sampled_digest([path]) != before


@pytest.mark.parametrize("name", ["chat_template.jinja", "config.json", "model.bin", "a.jsonl"])
def test_what_of_a_folder_a_comparison_depends_on(tmp_path: Path, name: str) -> None:
    (tmp_path / "model").mkdir()
    cfg = OmegaConf.create({"path": str(tmp_path / "model")})
    found = set()
    for content in ("a", "b"):
        (tmp_path / "model" / name).write_text(content)
        found.add(fingerprint(cfg, tmp_path / "out"))
    assert len(found) == 2


def test_a_file_that_is_found_below_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the shipped data are where the command is given in another folder."""
    home, here = tmp_path / "home", tmp_path / "here"
    for folder in (home / "data", here):
        folder.mkdir(parents=True)
    monkeypatch.setattr("emarecipes.config.home", lambda: home)
    monkeypatch.chdir(here)
    cfg = OmegaConf.create({"answers": {"files": ["data/rows.jsonl"]}})
    found = {fingerprint(cfg, tmp_path / "out")}
    for content in ("a", "b"):
        (home / "data/rows.jsonl").write_text(content)
        found.add(fingerprint(cfg, tmp_path / "out"))
    assert len(found) == 3
