"""The settings of a selection, and everything that can be found wrong before a weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from emarecipes.checked import Checked
from emarecipes.config import Origin, find_input
from emarecipes.datasets.refusals import check_refusal_words
from emarecipes.datasets.rows import Rows
from emarecipes.datasets.rows_fit import check_rows_fit
from emarecipes.errors import UserError
from emarecipes.fingerprint import adapter_content, digest, sampled_digest, stored
from emarecipes.models.chat.dates import adapter_date
from emarecipes.output_dir import check_output_dir, check_outside_output
from emarecipes.selection.candidates import Candidate, read_candidates
from emarecipes.selection.score_file import ADDED, FINGERPRINT, ScoreFile
from emarecipes.settings import Entry, ModelSettings, Positive, Seed, parse_settings


class SelectSettings(ModelSettings):
    """What `recipes/ema_select.py` reads at the top level of its config.

    Exactly one of `num_rows` and `fraction` must be given. `refusal_words` null: refusals are found
    by the rule of `is_refusal`. Nothing is drawn at random: `seed` is
    accepted and has no effect.
    """

    seed: Seed | None = None
    """Accepted, without effect: nothing is drawn at random."""
    candidates: Annotated[str, Field(min_length=1)]
    """Chat rows, one JSON object a line."""
    conversation_column: str = "messages"
    """The key of a row's conversation."""
    adapters: list[str]
    """Misaligned models, as adapters of this base; their NLLs are averaged."""
    num_rows: Positive | None = None
    """Rows to select; or `fraction`."""
    fraction: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Share of the rows left after the filter, in place of `num_rows`."""
    refusal_filter: bool = True
    """Leave refusals out; false: Interleaving+."""
    refusal_words: list[str] | None = None
    """Null: refusals by rule; or words or phrases among an answer's first ten words
    (docs/select.md#when-it-helps-what-it-costs)."""
    eps: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1e-6
    """gap = (NLL misaligned - NLL aligned) / (NLL aligned + eps)."""
    batch_size: Positive = 8
    """Rows scored together; changes no score by more than rounding (1e-4 in fp32)."""
    pad_to_multiple_of: Positive = 1
    """Sequence lengths are rounded up to a multiple; on a CPU every new length costs seconds."""
    provenance: Entry | None = None
    """Written into a run's `config.yaml`; not read."""


def check_select_settings(cfg: DictConfig, origin: Origin) -> DictConfig:
    """The config with defaults filled in, and its candidates and adapters found.

    Raises:
        UserError: See `parse_settings`; not one of `num_rows` and `fraction`; no refusal words, or
            one without a letter; no adapters, one twice, or a folder that is not there; no such
            file of candidates.
    """
    settings = parse_settings(cfg, origin, SelectSettings)
    if (settings.num_rows is None) == (settings.fraction is None):
        raise UserError(f"{origin.at('num_rows')}: give one of num_rows and fraction")
    check_refusal_words(settings.refusal_words, origin)
    settings.candidates = find_input(settings.candidates)
    if not Path(settings.candidates).is_file():
        raise UserError(f"{origin.at('candidates')}: no such file: {settings.candidates}")
    where = origin.at("adapters")
    settings.adapters = [find_input(adapter) for adapter in settings.adapters]
    if not settings.adapters:
        raise UserError(f"{where}: name the folder of at least one misaligned model's adapter")
    if len({Path(adapter).resolve() for adapter in settings.adapters}) < len(settings.adapters):
        raise UserError(f"{where}: an adapter is named twice")
    for adapter in settings.adapters:
        if not Path(adapter).is_dir():
            raise UserError(
                f"{where}: no such adapter folder: {adapter}; train it first, the config's header "
                "shows how"
            )
    return OmegaConf.create(settings.model_dump())


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
        _tell_replaced(self.candidates, origin)
        self.scored = [candidate for candidate in self.candidates if candidate.tokens]
        self.num_selected = _num_selected(cfg, origin, self.candidates)
        dropped = len(self.candidates) - len(self.scored)
        self.rows = Rows([candidate.sample for candidate in self.scored], dropped=dropped)
        check_rows_fit(cfg, origin, self.rows, self.source.meta_model)
        self.file = ScoreFile(Path(cfg.output_dir), _fingerprint(cfg, self.rows))
        self.file.check(origin, overwrite=cfg.overwrite)

    def _stored(self, key: Literal["dtype", "date"]) -> str | None:
        return None if self.cfg.overwrite else stored(Path(self.cfg.output_dir) / FINGERPRINT, key)


def _tell_replaced(candidates: Sequence[Candidate], origin: Origin) -> None:
    replaced = [key for key in ADDED if any(key in one.row for one in candidates)]
    if replaced:
        print(
            f"{origin.at('candidates')}: rows have {' and '.join(replaced)} of their own; in "
            "selected.jsonl these are this selection's",
            flush=True,
        )


def _num_selected(cfg: DictConfig, origin: Origin, candidates: Sequence[Candidate]) -> int:
    without_answer = sum(not c.tokens for c in candidates)
    copies = sum(c.copy and c.tokens > 0 for c in candidates)
    first = [c for c in candidates if c.tokens and not c.copy]
    dropped = sum(c.refusal for c in first) if cfg.refusal_filter else 0
    left = len(first) - dropped
    account = (
        f"{left} of {len(candidates)} candidates are left ({dropped} refusals, {without_answer} "
        f"without an answer token, {copies} copies of an earlier row)"
    )
    if copies:
        print(f"{origin.at('candidates')}: {account}", flush=True)
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
    adapters = {adapter: adapter_content(Path(adapter)) for adapter in cfg.adapters}
    return {
        "dtype": str(cfg.dtype),
        "model": digest(model, checkpointer, sampled_digest(weights)),
        "adapters": digest(adapters),
        "candidates": digest(Path(cfg.candidates), cfg.conversation_column),
        "tokenization": rows.fingerprint,
        **({} if cfg.tokenizer.get("date") is None else {"date": str(cfg.tokenizer.date)}),
    }
