"""Names that a package has of its files, each imported when the name is first asked for.

Whoever wants one file of a package imports its `__init__` too, and would otherwise wait for all of
it: torch and torchtune, ten seconds, for a task of Inspect's or a check of data that needs neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lent(package: str, files: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package.

    Args:
        package: Its `__name__`.
        files: The module below the package that each name is from.
    """

    def get(name: str) -> Any:
        if name not in files:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{files[name]}"), name)

    return get
