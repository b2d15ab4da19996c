"""Rows on disk: exact, whole or not there, with several writers, dead ones and full disks."""

import errno
import multiprocessing
import os
import signal
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_disk
import toy_run

from emarecipes.errors import UserError
from emarecipes.training.row_store import RowStore, StoreLayout, in_words, open_store

KEY = {"weights": "abc"}
LAYOUT = StoreLayout(np.array([3, 0, 5, 2]), width=4, dtype=torch.float32)


@contextmanager
def opened(folder: Path, layout: StoreLayout = LAYOUT) -> Iterator[RowStore]:
    store = open_store(folder, KEY, layout, "config.yaml:3: reference_cache")
    yield store
    store.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_come_back_bit_for_bit_in_any_order(tmp_path: Path, dtype: torch.dtype) -> None:
    layout = StoreLayout(LAYOUT.vectors_N, width=4, dtype=dtype)
    rows = {row: torch.randn(int(n), 4).to(dtype) for row, n in enumerate(layout.vectors_N)}
    with opened(tmp_path / "a", layout) as store:
        assert [store.read(row) is None for row in range(4)] == [True, False, True, True]
        for row in (2, 0, 3):
            store.write(row, rows[row])
    with opened(tmp_path / "a", layout) as store:
        for row, values in rows.items():
            found = store.read(row)
            assert found is not None and found.dtype == dtype
            assert torch.equal(found, values)
        assert store.num_filled() == 4
    assert (tmp_path / "a/states.bin").stat().st_size == 10 * 4 * dtype.itemsize


def test_a_row_that_changed_on_disk_is_not_there(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.write(0, torch.ones(3, 4))
        store.write(3, torch.ones(2, 4))
        with (tmp_path / "states.bin").open("r+b") as file:
            file.seek(5)
            file.write(b"x")
        assert store.read(0) is None
        assert store.read(3) is not None
        os.truncate(tmp_path / "states.bin", 20)
        assert store.read(3) is None
        store.write(3, torch.full((2, 4), 2.0))
        assert torch.equal(store.read(3), torch.full((2, 4), 2.0))


def run_program(path: Path, program: str) -> tuple[int | None, str, str]:
    """In a process of its own: its exit code, what it printed, and its errors."""
    path.write_text(textwrap.dedent(program))
    tests = str(Path(toy_run.__file__).parent)
    started = toy_run.start([str(path)], PYTHONPATH=tests)
    printed, errors = started.communicate(timeout=60)
    return started.returncode, printed, errors


def test_a_writer_killed_within_a_row_leaves_the_rows_before(tmp_path: Path) -> None:
    """SIGKILL after half of row 2's data, and one before the store was complete."""
    program = f"""
        import os, signal
        import numpy as np, torch
        from pathlib import Path
        from emarecipes.training import row_store
        layout = row_store.StoreLayout(np.array([3, 0, 5, 2]), width=4, dtype=torch.float32)
        store = row_store.open_store(Path({str(tmp_path / "s")!r}), {{}}, layout, "")
        store.write(0, torch.full((3, 4), 7.0))
        whole = row_store._write
        def half(file, data, offset):
            whole(file, data[: len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        row_store._write = half
        store.write(2, torch.full((5, 4), 7.0))
    """
    code, _, errors = run_program(tmp_path / "program.py", program)
    assert code == -signal.SIGKILL, errors
    with opened(tmp_path / "s") as store:
        assert torch.equal(store.read(0), torch.full((3, 4), 7.0))
        assert store.read(2) is None
        assert 7.0 in np.fromfile(tmp_path / "s/states.bin", np.float32)[12:]
        store.write(2, torch.ones(5, 4))
        assert torch.equal(store.read(2), torch.ones(5, 4))
    # One that died before key.json had reserved room: it is made anew.
    (tmp_path / "s/key.json").unlink()
    with opened(tmp_path / "s") as store:
        assert store.read(0) is None
        assert (tmp_path / "s/key.json").exists()


def _write_often(folder: Path, value: float, times: int) -> None:
    store = open_store(folder, KEY, WIDE, "")
    for _ in range(times):
        store.write(0, torch.full((200, 512), value))


WIDE = StoreLayout(np.array([200]), width=512, dtype=torch.float32)


def test_two_writers_of_one_row_never_show_a_mixture(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [
        context.Process(target=_write_often, args=(tmp_path / "new", value, 150))
        for value in (1.0, 2.0)
    ]
    for writer in writers:
        writer.start()
    for writer in writers[:1]:
        while not (tmp_path / "new/key.json").exists():
            writer.join(0.01)
    seen = set()
    with opened(tmp_path / "new", WIDE) as store:
        while any(writer.is_alive() for writer in writers):
            found = store.read(0)
            if found is not None:
                assert found.min() == found.max()
                seen.add(float(found[0, 0]))
        for writer in writers:
            writer.join()
            assert writer.exitcode == 0
        last = store.read(0)
        assert last is None or last.min() == last.max()
    assert seen <= {1.0, 2.0}
    assert seen


@pytest.fixture
def forbid_writing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Takes a folder's write permission away; from root, who needs none, by refusing as well."""

    def forbid(folder: Path) -> None:
        for path in folder.iterdir():
            path.chmod(0o444)
        folder.chmod(0o555)
        if os.geteuid() != 0:
            return
        open_number, open_path = os.open, Path.open

        def refusing(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
            if Path(path).parent == folder and flags & (os.O_WRONLY | os.O_RDWR):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return open_number(path, flags, *arguments, **options)

        def refusing_path(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if path.parent == folder and mode[0] != "r":
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return open_path(path, mode, *arguments, **options)

        monkeypatch.setattr(os, "open", refusing)
        monkeypatch.setattr(Path, "open", refusing_path)

    return forbid


def test_a_complete_store_that_may_only_be_read(
    tmp_path: Path, forbid_writing: Callable[[Path], None]
) -> None:
    folder = tmp_path / "s"
    with opened(folder) as store:
        for row in (0, 2, 3):
            store.write(row, torch.full((int(LAYOUT.vectors_N[row]), 4), float(row)))
    forbid_writing(folder)
    with opened(folder) as store:
        assert torch.equal(store.read(2), torch.full((5, 4), 2.0))
        with pytest.raises(OSError):
            store.write(2, torch.zeros(5, 4))
        assert torch.equal(store.read(2), torch.full((5, 4), 2.0))


def test_one_that_lacks_a_row_must_be_writable(
    tmp_path: Path, forbid_writing: Callable[[Path], None]
) -> None:
    folder = tmp_path / "s"
    with opened(folder) as store:
        store.write(0, torch.ones(3, 4))
    forbid_writing(folder)
    with pytest.raises(UserError, match=r"^config.yaml:3: reference_cache: .*Permission denied$"):
        open_store(folder, KEY, LAYOUT, "config.yaml:3: reference_cache")


def test_no_room_for_it_is_one_clear_line(tmp_path: Path) -> None:
    layout = StoreLayout(np.array([2**40]), width=4096, dtype=torch.bfloat16)
    with pytest.raises(UserError) as error:
        open_store(tmp_path / "s", KEY, layout, "config.yaml:3: reference_cache")
    message = str(error.value)
    assert message.startswith("config.yaml:3: reference_cache: the cache needs 9.01e+06 GB in ")
    assert "bf16, or leave the key out" in message
    # Before release 4, filelock deletes its file.
    assert {path.name for path in (tmp_path / "s").iterdir()} <= {"lock"}


def test_a_small_full_disk(tmp_path: Path) -> None:
    """A file system of 64 kB: 60 kB go in, 70 kB are refused, and nothing stays behind."""
    if not toy_disk.possible():
        pytest.skip("no mount namespaces here")
    disk = tmp_path / "disk"
    disk.mkdir()
    program = f"""
        import numpy as np, torch, toy_disk
        from pathlib import Path
        from emarecipes.errors import UserError
        from emarecipes.training.row_store import StoreLayout, open_store
        disk = Path({str(disk)!r})
        toy_disk.mount(disk, 64 * 2**10)
        def store(name, numbers):
            layout = StoreLayout(np.array([numbers]), width=1, dtype=torch.float32)
            return open_store(disk / name, {{}}, layout, "here")
        try:
            store("large", 70_000 // 4)
        except UserError as error:
            print(error)
        print(sorted(p.name for p in (disk / "large").iterdir() if p.name != "lock"))
        small = store("small", 32_000 // 4)
        small.write(0, torch.ones(32_000 // 4, 1))
        print(bool((small.read(0) == 1).all()))
    """
    code, printed, errors = run_program(tmp_path / "program.py", program)
    assert code == 0, errors
    lines = printed.splitlines()
    assert lines[0].startswith("here: the cache needs 70 kB in ")
    assert lines[1:] == ["[]", "True"]


def test_sizes_in_words() -> None:
    assert [in_words(n) for n in (1500, 2_500_000, 12_345_678_900)] == [
        "1.5 kB",
        "2.5 MB",
        "12.3 GB",
    ]
