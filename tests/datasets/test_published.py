"""The table of published sets: pinned, and as the docs list it."""

import re

import pytest
import toy_run

from emarecipes.datasets._published_forms import FORMS
from emarecipes.datasets.published import PUBLISHED


@pytest.mark.parametrize("name", PUBLISHED)
def test_entries_are_pinned(name: str) -> None:
    entry = PUBLISHED[name]
    assert re.fullmatch("[0-9a-f]{40}", entry.revision) and entry.revision in entry.url
    assert entry.sha256 is None or re.fullmatch("[0-9a-f]{64}", entry.sha256)
    assert entry.form in FORMS
    fields = {"rows": entry.rows, "size": entry.size, "sha256": entry.sha256}
    assert all(field in entry.unconfirmed for field, value in fields.items() if value is None)


def test_the_docs_list_every_entry() -> None:
    page = (toy_run.REPO / "docs/data.md").read_text(encoding="utf-8")
    for name, entry in PUBLISHED.items():
        (line,) = [line for line in page.splitlines() if line.startswith(f"| `{name}`")]
        megabytes = None if entry.size is None else f"{entry.size / 1e6:.3g}"
        wanted = [
            "-" if value is None else f"{value}{' ?' if field in entry.unconfirmed else ''}"
            for field, value in {"rows": entry.rows, "size": megabytes}.items()
        ]
        assert line.startswith(f"| `{name}` | {' | '.join(wanted)} |")
        assert entry.revision[:7] in line
