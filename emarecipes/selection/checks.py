"""Everything that can be found wrong with a selection before a weight is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from emarecipes.components import build, check_components
from emarecipes.config import Origin, load_config
from emarecipes.datasets.rows import Rows
from emarecipes.datasets.rows_fit import check_rows_fit
from emarecipes.defenses import ModelSource
from emarecipes.errors import UserError
from emarecipes.fingerprint import digest, sampled_digest, stored
from emarecipes.models.adapters.read import check_adapter
from emarecipes.models.adapters.trained_with import check_origin
from emarecipes.models.chat.dates import adapter_date, settle_date
from emarecipes.models.model_checks import check_checkpoint_files, check_device, check_model
from emarecipes.output_dir import check_output_dir, check_outside_output
from emarecipes.selection.candidates import Candidate, read_candidates
from emarecipes.selection.score_file import FINGERPRINT, ScoreFile
from emarecipes.selection.settings import check_select_settings


@dataclass
class CheckedSelection:
    """A selection that passed every check, with what was built on the way.

    Attributes:
        candidates: All rows of the file.
        scored: Those with an answer token; `rows` holds their tokens, in the same order.
        num_selected: How many rows will be selected.
    """

    cfg: DictConfig
    tokenizer: Any
    source: ModelSource
    candidates: list[Candidate]
    scored: list[Candidate]
    rows: Rows
    num_selected: int
    file: ScoreFile


def check_selection(argv: Sequence[str]) -> CheckedSelection:
    """Read and check a selection: config, files, adapters, candidates, an earlier run's scores.

    Args:
        argv: `--config FILE` and overrides.

    Raises:
        UserError: The first thing that is wrong.
    """
    raw, origin = load_config(argv)
    cfg = check_select_settings(raw, origin)
    check_components(cfg, origin)
    earlier = Path(cfg.output_dir) / FINGERPRINT
    check_device(cfg, origin, None if cfg.overwrite else stored(earlier, "dtype"))
    check_output_dir(cfg, origin)
    inputs = (origin.path, Path(cfg.candidates), *map(Path, cfg.adapters))
    check_outside_output(cfg, origin, inputs)
    check_checkpoint_files(cfg, origin)
    source = check_model(cfg, origin)
    for adapter in cfg.adapters:
        try:
            check_adapter(Path(adapter), source)
        except UserError as error:
            raise UserError(f"{origin.at('adapters')}: {error}") from None
        check_origin(Path(adapter), cfg, origin.at("adapters"))

    date = None if cfg.overwrite else stored(earlier, "date")
    of_adapters = {f"adapters.{i}": adapter_date(path) for i, path in enumerate(cfg.adapters)}
    settle_date(cfg, origin, of_adapters if date is None else {"output_dir": date})
    tokenizer = build(cfg, "tokenizer", origin)
    words = None if cfg.refusal_words is None else list(cfg.refusal_words)
    candidates = read_candidates(Path(cfg.candidates), cfg.conversation_column, tokenizer, words)
    scored = [candidate for candidate in candidates if candidate.tokens]
    num_selected = _num_selected(cfg, origin, candidates)
    rows = Rows([c.sample for c in scored], dropped=len(candidates) - len(scored))
    check_rows_fit(cfg, origin, rows, source.meta_model)
    file = ScoreFile(Path(cfg.output_dir), _fingerprint(cfg, rows))
    file.check(origin, overwrite=cfg.overwrite)
    return CheckedSelection(cfg, tokenizer, source, candidates, scored, rows, num_selected, file)


def _num_selected(cfg: DictConfig, origin: Origin, candidates: Sequence[Candidate]) -> int:
    without_answer = sum(not c.tokens for c in candidates)
    dropped = sum(c.refusal and c.tokens > 0 for c in candidates) if cfg.refusal_filter else 0
    left = len(candidates) - without_answer - dropped
    account = (
        f"{left} of {len(candidates)} candidates are left ({dropped} refusals, {without_answer} "
        "without an answer token)"
    )
    if left == 0:
        raise UserError(f"{origin.at('candidates')}: {account}")
    if cfg.num_rows is None:
        return max(1, round(float(cfg.fraction) * left))
    if cfg.num_rows > left:
        raise UserError(f"{origin.at('num_rows')}: asks for {cfg.num_rows} rows, {account}")
    return int(cfg.num_rows)


def _fingerprint(cfg: DictConfig, rows: Rows) -> dict[str, str]:
    """What the likelihoods depend on. Which rows are selected by them may change between runs."""
    entry = OmegaConf.to_container(cfg.checkpointer)
    assert isinstance(entry, dict)
    base = Path(cfg.checkpointer.checkpoint_dir)
    checkpointer = {k: v for k, v in entry.items() if k not in ("checkpoint_dir", "output_dir")}
    model: Any = OmegaConf.to_container(cfg.model)
    model.pop("path", None)  # `lora_model`'s folder, whose files are compared.
    weights = sorted([*base.glob("*.safetensors"), *base.glob("*.bin"), base / "config.json"])
    adapters = {
        adapter: digest(*sorted(Path(adapter).glob("adapter_*"))) for adapter in cfg.adapters
    }
    return {
        "dtype": str(cfg.dtype),
        "model": digest(model, checkpointer, sampled_digest(weights)),
        "adapters": digest(adapters),
        "candidates": digest(Path(cfg.candidates), cfg.conversation_column),
        "tokenization": rows.fingerprint,
        **({} if cfg.tokenizer.get("date") is None else {"date": str(cfg.tokenizer.date)}),
    }
