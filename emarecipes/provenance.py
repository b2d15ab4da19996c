"""What produced a result: versions, commit and command line."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import emarecipes
from emarecipes.config import home

_VERSIONED = ("torch", "torchtune", "torchao", "datasets", "omegaconf", "tokenizers", "safetensors")


def environment() -> dict[str, Any]:
    """What produced a result: versions, commit and command line."""
    return {
        "emarecipes": emarecipes.__version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _VERSIONED},
        "arguments": sys.argv[1:],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the clone that runs, with `+changes` if files differ from it."""
    if not (home() / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(home()), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return f"{commit}+changes" if git("status", "--porcelain", "-uno") else commit
    except (OSError, subprocess.CalledProcessError):
        return None
