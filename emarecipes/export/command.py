"""`python -m emarecipes.export gguf ADAPTER_DIR [--output FILE] [--base DIR]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from emarecipes.errors import UserError
from emarecipes.models.adapters.gguf import save_gguf


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code (0; 1 after one line on stderr)."""
    parser = argparse.ArgumentParser(
        prog="python -m emarecipes.export",
        description="Write an adapter as another program reads it.",
    )
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    gguf = formats.add_parser("gguf", help="a LoRA GGUF, for llama.cpp")
    gguf.add_argument("adapter", metavar="ADAPTER_DIR", help="the adapter/ of a run, or PEFT's")
    gguf.add_argument("--output", metavar="FILE", help="default: ADAPTER_DIR/adapter.gguf")
    gguf.add_argument("--base", metavar="DIR", help="default: the folder that the adapter names")
    args = parser.parse_args(arguments)
    folder = Path(args.adapter)
    output = Path(args.output) if args.output else folder / "adapter.gguf"
    if not output.parent.is_dir():
        print(f"error: --output: no such folder: {output.parent}", file=sys.stderr)
        return 1
    try:
        save_gguf(folder, output, None if args.base is None else Path(args.base))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename or output}: {error.strerror or error}", file=sys.stderr)
        return 1
    print(f"written: {output}")
    return 0
