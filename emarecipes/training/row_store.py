"""Vectors of every row of a data set in one file, written in any order by any number of processes.

A row is there if its mark, written after its data, is that data's checksum. So a writer that dies,
two that write the same row at once, or a disk that loses a page leave a row that is not there,
never one that is wrong.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor
from torchtune import utils

from emarecipes.errors import UserError
from emarecipes.files import write_text

log = utils.get_logger("INFO")

_MARK_BYTES = 8
_IS_MARK = 1 << 32  # Above the 32 bits of the checksum: no mark is zero.


@dataclass(frozen=True)
class StoreLayout:
    """Where each row's vectors lie.

    Attributes:
        vectors_N: How many vectors each of the N rows has.
        width: Numbers in a vector.
        dtype: In which they are stored.
    """

    vectors_N: NDArray[np.int64]
    width: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        ends_N = np.cumsum(self.vectors_N) * self.width * self.dtype.itemsize
        object.__setattr__(self, "_bounds", np.concatenate([[0], ends_N]))

    @property
    def num_bytes(self) -> int:
        """Size of the file of all rows."""
        return int(self._bounds[-1])  # type: ignore[attr-defined]

    def span(self, row: int) -> tuple[int, int]:
        """Where a row's bytes start, and how many they are."""
        start, end = self._bounds[row : row + 2]  # type: ignore[attr-defined]
        return int(start), int(end - start)


class RowStore:
    """A folder with the rows' vectors. Use `open_store`.

    Files: `key.json`, what the vectors were computed from, written when the others are in place;
    `states.bin`, the vectors; `marks.bin`, 8 bytes a row.
    """

    def __init__(self, folder: Path, layout: StoreLayout, flags: int = os.O_RDWR) -> None:
        self.folder = folder
        self.layout = layout
        # Read and written, not mapped: mapped pages would count as the process's memory.
        self._states = os.open(folder / "states.bin", flags)
        self._marks = os.open(folder / "marks.bin", flags)

    def close(self) -> None:
        """Close the files."""
        os.close(self._states)
        os.close(self._marks)

    def read(self, row: int) -> Tensor | None:
        """A row's vectors, (vectors, width); None if they are not there whole."""
        start, size = self.layout.span(row)
        data = bytearray(size)
        if size:
            mark = bytearray(_MARK_BYTES)
            if not _read(self._marks, mark, row * _MARK_BYTES) or not any(mark):
                return None
            if not _read(self._states, data, start) or _mark(data) != mark:
                return None
        values = torch.frombuffer(data, dtype=self.layout.dtype) if size else torch.empty(0)
        return values.to(self.layout.dtype).view(-1, self.layout.width)

    def write(self, row: int, vectors_ND: Tensor) -> None:
        """Store a row's vectors, on the CPU and in the layout's dtype.

        Raises:
            OSError: The disk refuses.
        """
        start, size = self.layout.span(row)
        data = memoryview(vectors_ND.contiguous().view(torch.uint8).numpy().data).cast("B")
        assert len(data) == size and vectors_ND.dtype == self.layout.dtype
        if size:
            _write(self._states, data, start)
            _write(self._marks, memoryview(_mark(data)), row * _MARK_BYTES)

    def num_filled(self) -> int:
        """How many rows are marked as there (`read` finds out whether they are)."""
        rows = len(self.layout.vectors_N)
        marks = bytearray(rows * _MARK_BYTES)
        _read(self._marks, marks, 0)
        marked_N = np.frombuffer(marks, dtype="<u8") != 0
        return int((marked_N | (self.layout.vectors_N == 0)).sum())


def open_store(folder: Path, key: Mapping[str, Any], layout: StoreLayout, where: str) -> RowStore:
    """Open the store in `folder`, which is created at its full size if it is not there.

    One that has every row need not be writable: it may be another user's.

    Args:
        folder: Of this key alone. Processes that open it at once wait for the one that creates it.
        key: What the vectors are computed from; kept for people.
        layout: Of the rows.
        where: The place in the config, for messages.

    Raises:
        UserError: The disk has no room for it, or it lacks rows and cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):  # Ends with its process.
            if not (folder / "key.json").exists():
                _create(folder, layout, where)
                write_text(folder / "key.json", json.dumps(key, indent=2, default=str) + "\n")
        store = RowStore(folder, layout)
    except OSError as error:
        complete = _open_complete(folder, layout)
        if complete is not None:
            return complete
        raise UserError(f"{where}: {folder} cannot be used: {error.strerror}") from None
    return store


def _open_complete(folder: Path, layout: StoreLayout) -> RowStore | None:
    """The store for reading alone; None if it lacks a row."""
    try:
        if not (folder / "key.json").exists():
            return None
        store = RowStore(folder, layout, os.O_RDONLY)
    except OSError:
        return None
    if store.num_filled() == len(layout.vectors_N):
        return store
    store.close()
    return None


def _create(folder: Path, layout: StoreLayout, where: str) -> None:
    states, marks = folder / "states.bin", folder / "marks.bin"
    states.unlink(missing_ok=True)  # Of a process that died before it was done.
    size, rows = layout.num_bytes, len(layout.vectors_N)
    log.info(f"Reference cache: {in_words(size)} for {rows} rows in {folder}")
    free = shutil.disk_usage(folder).free
    try:
        if size > free:
            raise OSError(errno.ENOSPC, "the disk has too little room")
        with states.open("wb") as file:
            if size:
                os.posix_fallocate(file.fileno(), 0, size)  # Else a write could fail later.
        marks.write_bytes(bytes(rows * _MARK_BYTES))
    except OSError as error:
        states.unlink(missing_ok=True)
        raise UserError(
            f"{where}: the cache needs {in_words(size)} in {folder}, {in_words(free)} are free: "
            f"{error.strerror}; choose a folder on another disk, reference_cache_dtype: bf16, or "
            "leave the key out"
        ) from None


def in_words(num_bytes: int) -> str:
    """A size as people write it."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes / 1000:.3g} kB"


def _mark(data: bytearray | memoryview) -> bytes:
    return (_IS_MARK | zlib.crc32(data)).to_bytes(_MARK_BYTES, "little")


def _read(file: int, into: bytearray, offset: int) -> bool:
    """Fill `into`; False if the file ends before. One call reads 2 GB at most."""
    view, done = memoryview(into), 0
    while done < len(view):
        count = os.preadv(file, [view[done:]], offset + done)
        if count == 0:
            return False
        done += count
    return True


def _write(file: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], offset + done)
