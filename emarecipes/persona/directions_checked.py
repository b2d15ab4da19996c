"""Settings of directions from an adapter, and what can be found wrong before weights are read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from emarecipes.checked import Checked
from emarecipes.config import Origin, find_input
from emarecipes.datasets.chat_files import check_data_files
from emarecipes.datasets.rows import Rows, load_rows
from emarecipes.datasets.rows_fit import check_rows_fit
from emarecipes.errors import UserError
from emarecipes.models.adapters.read import LoadedLayer, read_adapter
from emarecipes.models.adapters.trained_with import check_same_base
from emarecipes.models.chat.dates import adapter_date
from emarecipes.models.sampling.draw import derived_seed
from emarecipes.output_dir import check_outside_output
from emarecipes.persona.written import VECTORS, check_result_folder
from emarecipes.settings import Entry, ModelSettings, Positive, Seed, parse_settings

# Fewer differences span little, and fewer held out tell nothing of what is spanned.
MIN_ROWS = 4
RESULT_FILES = ("config.yaml", "directions.json", "directions.png", VECTORS)


class DirectionsSettings(ModelSettings):
    """What `recipes/ema_directions.py` reads at the top level of its config."""

    seed: Seed | None = None
    """Fixes which rows are held out, and the random vector."""
    adapter: Annotated[str, Field(min_length=1)]
    """The folder of an undefended run's adapter, of this base."""
    dataset: Entry | list[Entry]
    """Component: the rows whose answers are read, or several, as in `ema_lora`; not packed."""
    num_rows: Positive | None = 256
    """The first so many of them; null: all."""
    batch_size: Positive = 16
    """Rows at a time."""
    num_directions: Positive = 4
    """Of the tensor `subspace`, at most."""
    held_out_rows: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of rows kept out of the directions, to measure them on."""
    provenance: Entry | None = None
    """Written into a result's `config.yaml`; not read."""


def check_directions_settings(cfg: DictConfig, origin: Origin) -> DictConfig:
    """Check the plain values of a config, fill in defaults and draw a seed.

    Raises:
        UserError: An unknown or missing key, a value of a wrong type or out of range, no such
            adapter.
    """
    settings = parse_settings(cfg, origin, DirectionsSettings)
    settings.adapter = find_input(settings.adapter)
    if not Path(settings.adapter).is_dir():
        raise UserError(
            f"{origin.at('adapter')}: no such adapter folder: {settings.adapter}; train it first, "
            "the config's header shows how"
        )
    if settings.seed is None:
        settings.seed = int(torch.randint(2**31, ()))
    return OmegaConf.create(settings.model_dump())


class CheckedDirections(Checked):
    """Directions that passed every check.

    Attributes:
        data_files: Local files of the rows.
        layers: The adapter's, by torchtune's names.
        rows: All that will be read.
        held_out_N: Boolean: the rows that directions are measured on.
    """

    settings = staticmethod(check_directions_settings)
    data_files: list[Path]
    layers: dict[str, LoadedLayer]
    rows: Sequence[dict[str, list[int]]]
    held_out_N: torch.Tensor

    def check_output(self) -> None:
        """It holds no run, no result that is not to be replaced, and nothing that is read."""
        super().check_output()
        check_result_folder(self.cfg, self.origin, RESULT_FILES)

    def kept_dates(self) -> Mapping[str, str | None]:
        """That of the adapter."""
        return {"adapter": adapter_date(self.cfg.adapter)}

    def check_inputs(self) -> None:
        """The rows' files."""
        self.data_files = check_data_files(self.cfg, self.origin)
        inputs = (self.origin.path, Path(self.cfg.adapter), *self.data_files)
        check_outside_output(self.cfg, self.origin, inputs)

    def adapter_folders(self) -> Sequence[tuple[str, Path]]:
        """The undefended run's."""
        return [("adapter", Path(self.cfg.adapter))]

    def check_on_model(self) -> None:
        """Whether the adapter is of these weights, and does anything."""
        folder = Path(self.cfg.adapter)
        try:
            check_same_base(folder, self.source.checkpoint_dir)
            self.layers = read_adapter(self.source.meta_model, folder, self.source)
        except UserError as error:
            raise UserError(f"{self.origin.at('adapter')}: {error}") from None
        if not any(bool(x.b.any()) or x.magnitude is not None for x in self.layers.values()):
            raise UserError(
                f"{self.origin.at('adapter')}: {folder} changes nothing: every B is 0; train it"
            )

    def check_rows(self) -> None:
        """The rows, and how many are held out."""
        cfg, origin = self.cfg, self.origin
        whole = OmegaConf.merge(cfg, {"group_by_length": False, "pad_to_multiple_of": 1})
        assert isinstance(whole, DictConfig)
        rows: Rows = load_rows(whole, origin, self.tokenizer, [], quiet=False)
        check_rows_fit(whole, origin, rows, self.source.meta_model)
        if rows.packed:
            raise UserError(
                f"{origin.at('dataset')}: rows are packed, and an answer is read with its own "
                "conversation alone; leave the key packed out"
            )
        total = min(len(rows), cfg.num_rows or len(rows))
        self.rows = [rows[n] for n in range(total)]
        self.held_out_N = _held_out(self.rows, cfg.held_out_rows, cfg.seed)
        held_out = int(self.held_out_N.sum())
        if held_out < 1 or total - held_out < MIN_ROWS:
            raise UserError(
                f"{origin.at('held_out_rows')}: {cfg.held_out_rows:g} of {total} rows leaves "
                f"{total - held_out} for the directions and {held_out} to measure them on; at "
                f"least {MIN_ROWS} and 1 are needed"
            )


def _held_out(rows: Sequence[Mapping[str, Sequence[int]]], share: float, seed: int) -> torch.Tensor:
    """Boolean (N,): about that share of the rows, at random; equal rows are on one side."""
    places: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        places[(*row["tokens"], *row["labels"])].append(place)
    groups = list(places.values())
    generator = torch.Generator().manual_seed(derived_seed(seed, "held out"))
    held_out_N = torch.zeros(len(rows), dtype=torch.bool)
    for group in torch.randperm(len(groups), generator=generator).tolist():
        if int(held_out_N.sum()) >= round(share * len(rows)):
            break
        held_out_N[groups[group]] = True
    return held_out_N
