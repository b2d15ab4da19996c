"""How every recipe starts: one order of checks, all of them before a weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from emarecipes.components import build, check_components
from emarecipes.config import Origin, load_config
from emarecipes.errors import UserError
from emarecipes.models.adapters.read import check_adapter
from emarecipes.models.adapters.trained_with import check_origin
from emarecipes.models.chat.dates import settle_date
from emarecipes.models.model_checks import (
    check_checkpoint_files,
    check_device,
    check_dtype,
    check_model,
)
from emarecipes.models.source import ModelSource
from emarecipes.output_dir import check_writable


class Checked:
    """A start that passed every check, with what was built on the way.

    A recipe extends this by the methods below, which hold what is its own. They are called in one
    order, so that a mistake that all recipes can be started with gives one line in all of them,
    and of two mistakes the same one is told:

    settings, components, `output_dir`, device and dtype, the model's files, the day that prompts
    print, what the recipe reads, the model's shapes, adapters, what must suit the model, the
    tokenizer, rows.

    Attributes:
        cfg: The config with defaults filled in, and what was settled: dtype, date.
        origin: Where its keys were written.
        has_model: Whether it has a model, and so a tokenizer and a checkpointer.
        source: The model without weights, if it has one.
        tokenizer: torchtune's model transform, likewise.

    Args:
        argv: `--config FILE` and overrides.

    Raises:
        UserError: The first thing that is wrong.
    """

    cfg: DictConfig
    origin: Origin
    source: ModelSource
    tokenizer: Any

    def __init__(self, argv: Sequence[str]) -> None:
        raw, self.origin = load_config(argv)
        self.cfg = self.settings(raw, self.origin)
        self.has_model = self.cfg.get("model") is not None
        check_components(self.cfg, self.origin)
        self.check_output()
        if self.has_model:
            check_device(self.cfg, self.origin)
            check_dtype(self.cfg, self.origin, self.kept_dtype())
            check_checkpoint_files(self.cfg, self.origin)
            settle_date(self.cfg, self.origin, self.kept_dates())
        self.check_inputs()
        if self.has_model:
            self.source = check_model(self.cfg, self.origin)
            for key, folder in self.adapter_folders():
                self._check_adapter(self.origin.at(key), folder)
            self.check_on_model()
            self.tokenizer = build(self.cfg, "tokenizer", self.origin)
        self.check_rows()

    @staticmethod
    def settings(cfg: DictConfig, origin: Origin) -> DictConfig:
        """The config with defaults filled in, and what its keys say by themselves checked."""
        raise NotImplementedError

    def check_output(self) -> None:
        """Whether results may be written to `output_dir`."""
        check_writable(Path(self.cfg.output_dir), self.origin.at("output_dir"))

    def kept_dtype(self) -> str | None:
        """What was computed in before, where the recipe goes on with something."""
        return None

    def kept_dates(self) -> Mapping[str, str | None]:
        """The day of each thing that is gone on with or built on, by its key; see `settle_date`."""
        return {}

    def check_inputs(self) -> None:
        """The files that the recipe reads, and all else that needs no model."""

    def adapter_folders(self) -> Sequence[tuple[str, Path]]:
        """The folders of adapters that are put on the model, each with its key."""
        return ()

    def check_on_model(self) -> None:
        """What must suit the model: `source` is there."""

    def check_rows(self) -> None:
        """What becomes tokens: `tokenizer` is there."""

    def _check_adapter(self, where: str, folder: Path) -> None:
        try:
            check_adapter(folder, self.source)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        check_origin(folder, self.cfg, where)
