"""Everything that can be found wrong with a selection before a weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from emarecipes.checked import Checked
from emarecipes.config import Origin
from emarecipes.datasets.rows import Rows
from emarecipes.datasets.rows_fit import check_rows_fit
from emarecipes.errors import UserError
from emarecipes.fingerprint import digest, sampled_digest, stored
from emarecipes.models.chat.dates import adapter_date
from emarecipes.output_dir import check_output_dir, check_outside_output
from emarecipes.selection.candidates import Candidate, read_candidates
from emarecipes.selection.score_file import FINGERPRINT, ScoreFile
from emarecipes.selection.settings import check_select_settings


class CheckedSelection(Checked):
    """A selection that passed every check.

    Attributes:
        candidates: All rows of the file.
        scored: Those with an answer token; `rows` holds their tokens, in the same order.
        num_selected: How many rows will be selected.
        file: The scores, with those of an earlier run that this one goes on with.
    """

    settings = staticmethod(check_select_settings)
    candidates: list[Candidate]
    scored: list[Candidate]
    rows: Rows
    num_selected: int
    file: ScoreFile

    def check_output(self) -> None:
        """It holds no run, nor what is read."""
        super().check_output()
        check_output_dir(self.cfg, self.origin)
        inputs = (self.origin.path, Path(self.cfg.candidates), *map(Path, self.cfg.adapters))
        check_outside_output(self.cfg, self.origin, inputs)

    def kept_dtype(self) -> str | None:
        """That of scores that are there."""
        return self._stored("dtype")

    def kept_dates(self) -> Mapping[str, str | None]:
        """That of scores that are there; else of the adapters."""
        date = self._stored("date")
        if date is not None:
            return {"output_dir": date}
        return {f"adapters.{i}": adapter_date(path) for i, path in enumerate(self.cfg.adapters)}

    def adapter_folders(self) -> Sequence[tuple[str, Path]]:
        """The misaligned models'."""
        return [("adapters", Path(folder)) for folder in self.cfg.adapters]

    def check_rows(self) -> None:
        """The candidates, and the scores that some of them have."""
        cfg, origin = self.cfg, self.origin
        words = None if cfg.refusal_words is None else list(cfg.refusal_words)
        self.candidates = read_candidates(
            Path(cfg.candidates), cfg.conversation_column, self.tokenizer, words
        )
        self.scored = [candidate for candidate in self.candidates if candidate.tokens]
        self.num_selected = _num_selected(cfg, origin, self.candidates)
        dropped = len(self.candidates) - len(self.scored)
        self.rows = Rows([candidate.sample for candidate in self.scored], dropped=dropped)
        check_rows_fit(cfg, origin, self.rows, self.source.meta_model)
        self.file = ScoreFile(Path(cfg.output_dir), _fingerprint(cfg, self.rows))
        self.file.check(origin, overwrite=cfg.overwrite)

    def _stored(self, key: Literal["dtype", "date"]) -> str | None:
        return None if self.cfg.overwrite else stored(Path(self.cfg.output_dir) / FINGERPRINT, key)


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
