"""What the pages point to is there."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md"), *REPOSITORY.glob("data/*.md")]
LINK = re.compile(r"\]\((?!https?:)([^)\s]*)\)")


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_tests_that_are_named_are_there() -> None:
    """What docs/tried.md says is shown is shown."""
    named = set(re.findall(r"`(test_\w+)(?:\.py)?`", (REPOSITORY / "docs/tried.md").read_text()))
    files = list((REPOSITORY / "tests").rglob("test_*.py"))
    there = {name for f in files for name in re.findall(r"^def (test_\w+)", f.read_text(), re.M)}
    assert len(named) > 40
    assert named - there - {file.stem for file in files} == set()
