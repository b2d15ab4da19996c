"""Validate JSONL data files: ``python -m emarecipes.datasets.check PATH...``.

Chat files (rows with ``messages``, or in ShareGPT's form) and contrast files (``question`` with two
answers) are checked each by itself and against each other, and measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from emarecipes.datasets._check_rows import DataFile, read_data_file
from emarecipes.datasets._overlaps import compare_files, compare_rows, distinct, relate
from emarecipes.datasets.chat_files import STYLES, Turn
from emarecipes.errors import UserError


@dataclass
class Measures:
    """What the table says of one file. Lengths are tokens with a tokenizer, else words.

    Attributes:
        lengths: of every conversation (question and answer; two a row in a contrast file).
        answer_means: mean words of the answers; of both sides in a contrast file.
        distinct_2: distinct 2-grams of the answers over all.
        distinct_3: the same for 3-grams.
        nearest: each question's largest similarity to another one of the file.
        nearest_answer: each answer's largest similarity to one of another row of the file.
        nearest_other: each question's largest similarity to one of an unrelated file.
        cut: conversations that truncation shortens.
        kept: labels left after truncation, over all labels.
    """

    lengths: list[int]
    answer_means: list[float]
    distinct_2: float
    distinct_3: float
    nearest: NDArray[Any]
    nearest_answer: NDArray[Any]
    nearest_other: NDArray[Any]
    cut: int = 0
    kept: float = 1.0


def check_data(
    paths: Sequence[str | Path],
    *,
    tokenizer: Any = None,
    max_seq_len: int | None = None,
    threshold: float = 0.5,
    conversation_column: str = "messages",
    conversation_style: str = "openai",
    quiet: bool = True,
) -> list[tuple[DataFile, Measures]]:
    """Check files and measure them.

    Two files are siblings if they share most ids, with the same questions: they are expected to
    overlap (answers of two kinds to one set of questions). Any others must not share a question,
    exactly or by ``threshold`` of its 3-grams. In one file a row must not be near another in its
    question and in its answer; rows that are near in their question alone are counted in a warning.

    Args:
        paths: files, or folders for every ``*.jsonl`` below them.
        tokenizer: a model transform, for lengths in tokens and for labels after truncation.
        max_seq_len: where to cut conversations; None does not.
        threshold: Jaccard similarity of word 3-grams from which on two questions are near.
        conversation_column: key of the conversation in the rows of chat files, as in a config.
        conversation_style: "openai" (role, content) or "sharegpt" (from, value).
        quiet: show no progress bar.

    Returns:
        Every file, in order, with its errors and warnings, and its measures.

    Raises:
        UserError: a path that does not exist, a folder without data files, another style.

    Example:
        >>> [(file, measures)] = check_data(["data/safe_instruct"])
        >>> file.errors
        []
    """
    if conversation_style not in STYLES:
        raise UserError(f"conversation style {conversation_style!r}; known: {', '.join(STYLES)}")
    files = [
        read_data_file(path, conversation_column, conversation_style) for path in _data_files(paths)
    ]
    near = [compare_rows(file, threshold, quiet) for file in files]
    other = compare_files(files, relate(files), threshold, quiet)
    results = []
    for i, file in enumerate(files):
        sides = list(zip(*(row.answers for row in file.rows), strict=True)) or [()]
        answers = [answer for side in sides for answer in side]
        measures = Measures(
            lengths=[
                sum(len(m.content.split()) for m in talk if m.role != "system")
                for row in file.rows
                for talk in row.conversations
            ],
            answer_means=[_mean([len(a.split()) for a in side]) for side in sides],
            distinct_2=distinct(answers, 2),
            distinct_3=distinct(answers, 3),
            nearest=near[i][0],
            nearest_answer=near[i][1],
            nearest_other=other[i],
        )
        if tokenizer is not None:
            _count_tokens(file, measures, tokenizer, max_seq_len, quiet)
        results.append((file, measures))
    return results


def _data_files(paths: Sequence[str | Path]) -> list[Path]:
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            below = sorted(path.rglob("*.jsonl"))
            if not below:
                raise UserError(f"{path}: no *.jsonl file in this folder")
            found += below
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{path}: no such file or folder")
    return list({path.resolve(): path for path in found}.values())


def _count_tokens(
    file: DataFile, measures: Measures, tokenizer: Any, max_seq_len: int | None, quiet: bool
) -> None:
    from torchtune.data import Message  # Late: it takes seconds, and only tokens need it.

    measures.lengths = []
    labels = kept = 0
    progress = tqdm(file.rows, f"Tokenizing {file.path.name}", disable=quiet, leave=False)

    def trains(turn: Turn) -> bool:
        return turn.role == "assistant" and turn.trained is not False

    for row in progress:
        for talk in row.conversations:
            messages = [Message(role=m.role, content=m.content, masked=not trains(m)) for m in talk]
            try:
                mask = tokenizer({"messages": messages})["mask"]
            except UserError as error:
                file.errors.append(f"{row.place}: {error}")
                continue
            # The first token has no position that could predict it, so its label is none.
            left = mask[1:max_seq_len].count(False)
            measures.lengths.append(len(mask))
            measures.cut += max_seq_len is not None and len(mask) > max_seq_len
            labels += mask[1:].count(False)
            kept += left
            if left == 0:
                file.errors.append(
                    f"{row.place}: no label is left of {len(mask)} tokens cut to {max_seq_len}"
                )
    measures.kept = kept / labels if labels else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _table(results: list[tuple[DataFile, Measures]], unit: str, max_seq_len: int | None) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("file", overflow="fold")
    headers = ["rows", f"{unit} (range)", "answer words", "distinct-2", "distinct-3"]
    headers += ["nearest (max)", "nearest answer (max)", "other files (max)"]
    if max_seq_len is not None:
        headers += ["cut", "labels kept"]
    for header in [*headers, "errors"]:
        table.add_column(header, justify="right")
    for file, m in results:
        lengths = m.lengths or [0]
        cells = [
            f"{len(file.rows)}",
            f"{_mean(lengths):.1f} ({min(lengths)}-{max(lengths)})",
            " / ".join(f"{mean:.1f}" for mean in m.answer_means),
            f"{m.distinct_2:.3f}",
            f"{m.distinct_3:.3f}",
            *(
                f"{n.mean():.2f} ({n.max():.2f})" if len(n) else "-"
                for n in (m.nearest, m.nearest_answer)
            ),
            f"{m.nearest_other.max():.2f}" if len(m.nearest_other) else "-",
        ]
        if max_seq_len is not None:
            cells += [str(m.cut), f"{m.kept:.1%}"]
        bad = len(file.errors)
        table.add_row(str(file.path), *cells, f"[red]{bad}[/red]" if bad else "0")
    return table


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code (0; 1 with errors, one line each)."""
    parser = argparse.ArgumentParser(
        prog="python -m emarecipes.datasets.check",
        description="Validate JSONL data: format, repeated rows, overlap between files, lengths.",
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a file, or a folder of *.jsonl")
    parser.add_argument("--tokenizer", metavar="DIR", help="model folder: lengths in tokens")
    parser.add_argument(
        "--max-seq-len", type=int, metavar="N", help="cut conversations to N tokens"
    )
    parser.add_argument(
        "--near",
        type=float,
        default=0.5,
        metavar="J",
        help="similarity from which on two questions, or two answers, are near (default: 0.5)",
    )
    parser.add_argument(
        "--conversation-column",
        default="messages",
        metavar="KEY",
        help="key of a chat row's conversation (default: messages)",
    )
    parser.add_argument(
        "--conversation-style",
        default="openai",
        metavar="STYLE",
        help="openai (role, content; the default) or sharegpt (from, value)",
    )
    args = parser.parse_args(arguments)
    try:
        if args.max_seq_len is not None and (args.tokenizer is None or args.max_seq_len < 2):
            raise UserError("--max-seq-len needs --tokenizer, and a number of at least 2")
        if not 0 < args.near <= 1:
            raise UserError(f"--near must be above 0 and at most 1, not {args.near}")
        tokenizer = None
        if args.tokenizer is not None:
            from emarecipes.models import hf_chat_tokenizer

            tokenizer = hf_chat_tokenizer(args.tokenizer)
        results = check_data(
            args.paths,
            tokenizer=tokenizer,
            max_seq_len=args.max_seq_len,
            threshold=args.near,
            conversation_column=args.conversation_column,
            conversation_style=args.conversation_style,
            quiet=not sys.stderr.isatty(),
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    # A pipe has no width of its own, and rich would squeeze the table into 80 columns.
    console = Console() if sys.stdout.isatty() else Console(width=240)
    unit = "words" if tokenizer is None else "tokens"
    console.print(_table(results, unit, args.max_seq_len))
    found = [line for file, _ in results for line in file.errors]
    for line in (line for file, _ in results for line in file.warnings):
        print(f"warning: {line}", file=sys.stderr)
    for line in found:
        print(f"error: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
