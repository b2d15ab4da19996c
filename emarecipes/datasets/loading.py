"""`datasets.load_dataset` for torchtune's data sets, with every row as its file has it.

JSON and CSV have no types that a table could take over, so `datasets` guesses them: text that looks
like a date becomes one, `007` the number 7, `NA` nothing. Their files are found, and downloaded, by
`datasets`, and read here. Other formats, such as Parquet, state their types.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import DownloadConfig, DownloadManager, ReadInstruction, load_dataset_builder
from datasets import config as datasets_config
from datasets import load_dataset as load_tables
from datasets.packaged_modules.csv import csv
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.json import json
from datasets.packaged_modules.json.json import Json

from emarecipes.datasets.json_files import Place, json_rows
from emarecipes.errors import RowError, UserError, first_line

# What only concerns the making of tables.
_FOR_TABLES = ("verification_mode", "keep_in_memory", "save_infos", "num_proc")


class FileRow(dict[str, Any]):
    """A row, and `place`, where it was written."""

    def __init__(self, row: dict[str, Any], place: Place) -> None:
        super().__init__(row)
        self.place = place


class FileRows(list[FileRow]):
    """The rows of text files, with what torchtune asks of a data set beside a list's own."""

    def filter(self, function: Callable[[Any], bool]) -> FileRows:
        """Those for which `function` holds."""
        return FileRows(row for row in self if function(row))


def load_dataset(path: str, *, split: Any = None, **options: Any) -> Any:
    """The rows of a split, see `datasets.load_dataset`.

    Returns:
        `FileRows` where the source is JSON or CSV files, here or on the hub; else the table that
        `datasets` gives.

    Raises:
        UserError: A file that cannot be read, with the place.
    """
    found = {key: value for key, value in options.items() if key not in _FOR_TABLES}
    with _as_files():
        builder = load_dataset_builder(path, **found)
    if split is None or not isinstance(builder, Json | Csv):
        return load_tables(path, split=split, **options)
    read = _json if isinstance(builder, Json) else _csv
    rows = {
        name: FileRows(row for file in files for row in read(file, builder.config))
        for name, files in _files(builder).items()
    }
    spec = "+".join(rows) if split == "all" else str(split)
    parts = ReadInstruction.from_spec(spec).to_absolute({n: len(r) for n, r in rows.items()})
    return FileRows(row for part in parts for row in rows[part.splitname][part.from_ : part.to])


@contextmanager
def _as_files() -> Iterator[None]:
    """Make a builder of JSON or CSV files without what `datasets` does beside.

    It makes their modules ready for streams, which imports what of SciPy reads files (0.15 s), and
    tells a server that they were used: for a file on this machine too, and it waits for the answer,
    up to 3 s.
    """
    fresh = [m for m in (json, csv) if not hasattr(m, "_patched_for_streaming")]
    counts = datasets_config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets_config.HF_UPDATE_DOWNLOAD_COUNTS = False
    for module in fresh:
        module._patched_for_streaming = True
    try:
        yield
    finally:
        datasets_config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        for module in fresh:
            del module._patched_for_streaming


def _files(builder: Any) -> dict[str, list[Path]]:
    """By split, the files on this machine: downloaded, and extracted from archives."""
    manager = DownloadManager(
        dataset_name=builder.dataset_name,
        download_config=DownloadConfig(
            token=builder.token, storage_options=builder.storage_options, use_etag=False
        ),
        data_dir=builder.config.data_dir,
        base_path=builder.base_path,
        record_checksums=False,
    )
    found = manager.download_and_extract(builder.config.data_files)
    return {
        str(split): [Path(file) for file in manager.iter_files(paths)]
        for split, paths in found.items()
    }


def _json(path: Path, config: Any) -> Iterator[FileRow]:
    for place, row in json_rows(path, field=config.field, encoding=config.encoding):
        if isinstance(row, UserError):
            raise row
        if not isinstance(row, dict):
            raise RowError(f"{place}: a row must be a JSON object, not {row!r:.60}")
        yield FileRow(row, place)


def _csv(path: Path, config: Any) -> Iterator[FileRow]:
    """Rows of a CSV file, every text as it is written.

    pandas would take a first column for the index where all rows have one field more than the
    header, and rename a column that is there twice: both put other texts under a name.
    """
    options = config.pd_read_csv_kwargs | {"na_filter": False, "chunksize": None, "dtype": str}
    if options.get("index_col") is None:
        options["index_col"] = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            table = pd.read_csv(path, **options)
            if options.get("header") in ("infer", 0) and options.get("names") is None:
                first = pd.read_csv(path, **options | {"header": None, "nrows": 1})
                _check_header(path, first.iloc[0].tolist())
    except pd.errors.ParserWarning:
        raise RowError(f"{path}: its rows have more fields than its header has names") from None
    except ValueError as error:
        raise RowError(f"{path}: {first_line(error)}") from None
    for index, row in enumerate(table.to_dict("records")):
        yield FileRow({str(key): value for key, value in row.items()}, Place(path, "row", index))


def _check_header(path: Path, names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise RowError(f"{path}: its header names {name!r:.60} twice")
