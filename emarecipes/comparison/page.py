"""Writes a comparison's report: one HTML file, its pictures as PNG, and the table in Markdown."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from omegaconf import OmegaConf

from emarecipes.comparison import page_content as content
from emarecipes.comparison import page_plots as plots
from emarecipes.comparison.outcome import Outcome
from emarecipes.comparison.page_checklist import checklist
from emarecipes.comparison.results import read_metrics
from emarecipes.files import whole, write_text

PAGE, TABLE = "report.html", "report.md"
# Terms that every run has, beside its defenses' own.
_TERMS = ("ce", "ce_task", "ce_safe")


def write_report(outcome: Outcome, folder: Path) -> Path:
    """Write `report.html`, `report.md` and the pictures, each whole or not at all.

    Returns:
        The page's path. It needs no other file and no network.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = _pictures(outcome)
    for name, png in pictures.items():
        with whole(folder / f"{name}.png") as partial:
            partial.write_bytes(png)
    write_text(folder / TABLE, markdown(outcome))
    write_text(folder / PAGE, html(outcome, pictures))
    return folder / PAGE


def html(outcome: Outcome, pictures: dict[str, bytes]) -> str:
    """The page. Everything in it that came from a file is escaped."""
    environment = Environment(
        loader=PackageLoader("emarecipes.comparison", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["estimate"] = content.show
    return environment.get_template("page.html.j2").render(
        title=outcome.settings.title,
        pictures={name: _data_uri(png) for name, png in pictures.items()},
        versions=yaml.safe_dump(outcome.environment, sort_keys=False, allow_unicode=True),
        config=json.dumps(outcome.settings.model_dump(), indent=1, ensure_ascii=False),
        **_context(outcome),
    )


def markdown(outcome: Outcome) -> str:
    """Status, findings and the four-criteria table in Markdown."""
    lines = [f"# {_plain(outcome.settings.title)}", ""]
    lines += [f"- {_plain(line)}" for line in content.status(outcome)] + [""]
    for label, verdict, meaning in content.findings(outcome):
        lines.append(
            f"- **{_plain(label)}**: {_plain(verdict)}{_plain(f', {meaning}' if meaning else '')}"
        )
    headings = content.headings(outcome)
    lines += ["", f"| arm | {' | '.join(headings)} |"]
    lines.append("| --- " * (len(headings) + 1) + "|")
    for figures, cells in content.criteria_rows(outcome):
        texts = [
            _plain(
                "; ".join(
                    part
                    for part in (cell.value, f"{cell.sign} {cell.decision}".strip(), cell.note)
                    if part
                )
            )
            for cell in cells
        ]
        lines.append(f"| {_plain(figures.arm.label)} | {' | '.join(texts)} |")
    if outcome.not_run:
        lines += ["", _plain(f"No arm has: {', '.join(outcome.not_run)}.")]
    if outcome.missing:
        lines += ["", "Missing:", *(f"- {_plain(line)}" for line in outcome.missing)]
    return "\n".join(lines) + "\n"


def _context(outcome: Outcome) -> dict[str, Any]:
    return {
        "status": content.status(outcome),
        "findings": content.findings(outcome),
        "criteria": content.criteria_rows(outcome),
        "headings": content.headings(outcome),
        "frontier": content.frontier_rows(outcome),
        "figures": content.all_figures(outcome),
        "answers": content.sampled_answers(outcome),
        "checks": checklist(outcome),
        "missing": outcome.missing,
        "categories": [f for f in outcome.figures if f.categories and f.arm.role != "frontier"],
        "seeds": outcome.seeds,
        "not_run": outcome.not_run,
        "share": outcome.settings.bounds.effect_share,
        "learned": outcome.settings.bounds.learned,
    }


def _pictures(outcome: Outcome) -> dict[str, bytes]:
    number, unit = plots.numbers(outcome.figures), outcome.judged_by("general").unit
    labels = {f.arm.name: f.arm.series or f.arm.label for f in outcome.figures}
    shown = {
        f.arm.name: outcome.runs[f.arm.name]
        for f in outcome.figures
        if f.arm.name in outcome.runs and f.arm.role != "frontier"
    }
    series = {name: read_metrics(run) for name, run in shown.items()}
    terms = [*_TERMS, *dict.fromkeys(t for run in shown.values() for t in _defenses(run))]
    found = {
        "trade_off": plots.trade_off(
            outcome.figures,
            unit + _difference(outcome, less=True),
            outcome.judged_by("in_domain").unit + _difference(outcome),
        ),
        "categories": plots.categories(outcome.figures, unit + _difference(outcome)),
        "training": plots.training_curves(series, terms, number, labels),
    }
    return {name: png for name, png in found.items() if png is not None}


def _difference(outcome: Outcome, less: bool = False) -> str:
    if not outcome.paired:
        return ""
    return ", bad - good" + (" - controls" if less and outcome.effect.controls else "")


def _defenses(run: Path) -> list[str]:
    """Names of a run's defenses, under which its metrics hold their terms."""
    path = run / "config.yaml"
    if not path.is_file():
        return []
    return [str(name) for name in OmegaConf.select(OmegaConf.load(path), "defenses") or {}]


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    text = " ".join(text.split())
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in text)
