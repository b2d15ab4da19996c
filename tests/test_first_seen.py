"""Fetches that end at once are all remembered."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from emarecipes.datasets._downloads import remember, was_seen


def test_no_record_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would write the record that it had read, without what the others added meanwhile."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    names = [f"toy-{number}" for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: remember(name, "0"), names))
    assert [name for name in names if not was_seen(name)] == []
