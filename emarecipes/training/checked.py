"""Everything that can be found wrong with a run before a weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, OmegaConf
from torch import nn
from torchtune import utils
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX, padded_collate_packed

from emarecipes.checked import Checked
from emarecipes.components import locate
from emarecipes.config import Origin
from emarecipes.datasets.chat_files import check_data_files
from emarecipes.datasets.rows import Rows, load_rows
from emarecipes.datasets.rows_fit import check_packing, check_rows_fit
from emarecipes.defenses import Defense
from emarecipes.errors import UserError, reason
from emarecipes.fingerprint import named_paths
from emarecipes.models._torchtune import NF4_BLOCK, is_nf4
from emarecipes.models.adapters.read import LoadedLayer
from emarecipes.models.batch import Collate, make_batch
from emarecipes.models.chat.dates import adapter_date, cache_date
from emarecipes.models.model_checks import check_compiler, check_offloading
from emarecipes.output_dir import (
    check_further,
    check_output_dir,
    check_outside_output,
    is_replaced,
)
from emarecipes.training.checkpoint import Checkpoint
from emarecipes.training.checkpoint_resume import (
    check_same_base,
    check_same_defense_files,
    check_same_rows,
    check_same_run,
    describe_run,
    find_checkpoint,
    plain_config,
)
from emarecipes.training.component_checks import build_defenses, check_each, check_optimizer
from emarecipes.training.frozen_layers import check_freeze
from emarecipes.training.initialize import read_initial_adapter
from emarecipes.training.muon import check_muon, is_muon
from emarecipes.training.reference_cache import ReferenceCache
from emarecipes.training.settings import check_settings

log = utils.get_logger("INFO")

if TYPE_CHECKING:
    from emarecipes.training.probe import Probe


class CheckedRun(Checked):
    """A run that passed every check.

    Attributes:
        world_size: Number of processes.
        rank: This process's number.
        writes_run: Whether `output_dir` is written, and so must not hold another run.
        resumed: What it goes on from, if anything.
        stated: Its config before a resumed step's rows were shared out.
        data_files: What its rows and its `init_adapter` are read from.
        initial_adapter: What `init_adapter` names, by layer; empty for a resumed run.
        defenses: By name, in its order.
        rows: What it trains on; `collate` makes them a batch.
        probe: What is measured meanwhile, if anything.
        reference_cache: Opened after all checks, by `open_cache`.
    """

    settings = staticmethod(check_settings)
    resumed: Checkpoint | None = None
    stated: dict[str, Any]
    data_files: list[Path]
    initial_adapter: dict[str, LoadedLayer]
    defenses: dict[str, Defense]
    rows: Rows
    collate: Collate
    probe: Probe | None
    reference_cache: ReferenceCache | None = None

    def __init__(
        self, argv: Sequence[str], world_size: int, rank: int, writes_run: bool = True
    ) -> None:
        self.world_size, self.rank, self.writes_run = world_size, rank, writes_run
        super().__init__(argv)

    def check_output(self) -> None:
        """It holds no other run; or one that is resumed."""
        if self.writes_run:
            super().check_output()
            check_output_dir(self.cfg, self.origin)
            self.resumed = find_checkpoint(self.cfg, self.origin)

    def kept_dtype(self) -> str | None:
        """That of the run that is resumed."""
        return None if self.resumed is None else str(self.resumed.run["config"]["dtype"])

    def kept_dates(self) -> Mapping[str, str | None]:
        """That of what the run goes on from, or else of what it is built on."""
        if self.resumed is not None:
            return {"resume": self.resumed.run["config"]["tokenizer"].get("date")}
        adapter = adapter_date(self.cfg.init_adapter)
        if adapter is not None:
            return {"init_adapter": adapter}
        return {"reference_cache": cache_date(self.cfg.reference_cache)}

    def check_inputs(self) -> None:
        """Whether the run is the one that is resumed; its files; the optimizer."""
        cfg, origin = self.cfg, self.origin
        check_offloading(cfg, origin, self.world_size)
        check_compiler(cfg, origin)
        self.stated = plain_config(cfg)
        if self.resumed is not None:
            check_same_run(cfg, self.resumed, origin, self.world_size)
            check_same_base(cfg, self.resumed, origin)
            check_same_defense_files(cfg, self.resumed, origin)
        self.data_files = check_data_files(cfg, origin)
        for _, folder in self.adapter_folders():
            self.data_files += sorted(folder.glob("adapter_*"))
        if self.resumed is None:
            _check_inputs_outlive_outputs(cfg, origin, self.data_files)
        check_optimizer(cfg, origin, self.world_size)
        _check_logger(cfg, origin)

    def adapter_folders(self) -> Sequence[tuple[str, Path]]:
        """The one that the run begins with, if any; a resumed run has its own."""
        if self.resumed is not None or self.cfg.init_adapter is None:
            return []
        return [("init_adapter", Path(self.cfg.init_adapter))]

    def check_on_model(self) -> None:
        """The adapter that it begins with, packs, shards, defenses."""
        cfg, origin, model = self.cfg, self.origin, self.source.meta_model
        begun = bool(self.adapter_folders())
        self.initial_adapter = read_initial_adapter(cfg, origin, self.source) if begun else {}
        if is_muon(cfg):
            check_muon(cfg, origin, model, self.world_size)
        check_packing(cfg, origin, model)
        _check_sharding(cfg, origin, model, self.world_size)
        check_freeze(cfg, origin, model)
        self.defenses = build_defenses(cfg, origin, self.source)
        saving = [name for name, one in self.defenses.items() if one.has("saved_adapter")]
        check_further(cfg, origin, saving)

    def check_rows(self) -> None:
        """The rows, and the probes."""
        from emarecipes.training.probe import read_probe  # Here: it reads parts of this package.

        cfg, origin, model = self.cfg, self.origin, self.source.meta_model
        defenses = list(self.defenses.values())
        check_each(self.defenses, origin, "check_template", self.tokenizer)
        self.rows = load_rows(cfg, origin, self.tokenizer, defenses, quiet=self.rank != 0)
        if self.resumed is not None:
            check_same_rows(cfg, self.rows, self.resumed, origin)
        self.collate = _build_collate(cfg, origin, self.tokenizer, self.rows)
        steps = _check_rows(cfg, origin, self.rows, model, self.defenses, self.world_size)
        check_each(self.defenses, origin, "check_rows", self.rows)
        _check_warmup(cfg, origin, steps, quiet=self.rank != 0)
        self.probe = read_probe(cfg, origin, self.tokenizer, model)

    def description(self, world_size: int) -> dict[str, Any]:
        """What its checkpoints say of it, so that it can be told from another run."""
        return describe_run(self.cfg, self.stated, self.rows, world_size)

    @property
    def meta_model(self) -> Any:
        """The model with its adapter, on the meta device."""
        return self.source.meta_model


def _check_inputs_outlive_outputs(
    cfg: DictConfig, origin: Origin, data_files: Sequence[Path]
) -> None:
    """`overwrite` must not delete what the run reads."""
    inputs = [origin.path, Path(str(cfg.checkpointer.checkpoint_dir)), *data_files]
    if cfg.tokenizer.get("path") is not None:
        inputs.append(Path(str(cfg.tokenizer.path)))
    tree = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    named = named_paths([tree.get(key) for key in ("tokenizer", "defenses", "probe")])
    inputs += [path for path in named if is_replaced(Path(cfg.output_dir), path)]
    check_outside_output(cfg, origin, inputs)


def _check_logger(cfg: DictConfig, origin: Origin) -> None:
    if cfg.metric_logger is not None:
        name = str(cfg.metric_logger.get("_component_"))
        component = locate(name, origin.at("metric_logger._component_"))
        if not hasattr(component, "log_dict"):
            raise UserError(f"{origin.at('metric_logger')}: not one of torchtune's metric loggers")


def _check_sharding(cfg: DictConfig, origin: Origin, model: Any, world_size: int) -> None:
    for name, parameter in model.named_parameters():
        if is_nf4(parameter) and parameter.numel() % (NF4_BLOCK * world_size):
            raise UserError(
                f"{origin.at('model')}: {name} has {parameter.numel()} elements; in 4 bits on "
                f"{world_size} process(es) it needs a multiple of {NF4_BLOCK * world_size}"
            )
    names = set(cfg.custom_sharded_layers or ())
    if not names:
        return
    where = origin.at("custom_sharded_layers")
    unknown = sorted(names - {name for name, _ in model.named_modules()})
    if unknown:
        raise UserError(f"{where}: the model has no module {unknown[0]}")
    if not isinstance(model.output, nn.Module):
        raise UserError(
            f"{where}: does not work with a model whose output layer is tied to its embedding"
        )
    if "output" in names and any(p.requires_grad for p in model.output.parameters()):
        raise UserError(f"{where}: the output layer cannot be sharded apart while LoRA is on it")


def _check_rows(
    cfg: DictConfig,
    origin: Origin,
    rows: Rows,
    model: Any,
    defenses: dict[str, Defense],
    world_size: int,
) -> int:
    """Also: how many steps an epoch has."""
    needed = cfg.batch_size * cfg.gradient_accumulation_steps * world_size
    try:
        rows.num_steps(needed)
    except UserError as error:
        raise UserError(f"{origin.at('dataset.placement')}: {error}") from None
    if rows.num_steps(needed) == 0:
        raise UserError(
            f"{origin.at('dataset')}: {len(rows)} rows are too few for one step of {needed}: "
            f"batch_size {cfg.batch_size} x gradient_accumulation_steps "
            f"{cfg.gradient_accumulation_steps} x {world_size} process(es)"
        )
    check_rows_fit(cfg, origin, rows, model)
    for name, defense in defenses.items():
        for key, source in defense.needed_sources().items():
            if source not in rows.sources:
                raise UserError(
                    f"{origin.at(f'defenses.{name}.{key}')}: no row has the source {source}; "
                    "packed rows have none, safe ones come with an interleaved set"
                )
    if rows.safe_ce_weight == 0 and not any(_acts_on_safe(d) for d in defenses.values()):
        raise UserError(
            f"{origin.at('dataset.safe.ce_weight')}: at 0 safe rows act through defenses "
            "alone, and none has a term on them; leave the key out, or name one"
        )
    return rows.num_steps(needed)


def _acts_on_safe(defense: Defense) -> bool:
    has_term = defense.has("logit_term") or defense.has("hidden_term")
    return (
        has_term and defense.weight > 0 and defense.samples != "task" and not defense.is_objective
    )


def _check_warmup(cfg: DictConfig, origin: Origin, steps_per_epoch: int, *, quiet: bool) -> None:
    """torchtune's schedulers take any number, and train on with a rate that nobody asked for."""
    warmup = (cfg.lr_scheduler or {}).get("num_warmup_steps")
    if not isinstance(warmup, int):
        return
    where = origin.at("lr_scheduler.num_warmup_steps")
    if warmup < 0:
        raise UserError(f"{where}: must be >= 0, not {warmup}")
    steps = cfg.epochs * min(steps_per_epoch, cfg.max_steps_per_epoch or steps_per_epoch)
    if warmup >= steps and not quiet:
        log.warning(
            f"{where}: {warmup} of {steps} steps are warm-up, so the learning rate never gets to "
            f"{cfg.optimizer.get('lr')}"
        )


def _build_collate(cfg: DictConfig, origin: Origin, tokenizer: Any, rows: Rows) -> Collate:
    if rows.packed:
        return cast(Collate, padded_collate_packed)
    where = origin.at("collate_fn")
    collate = partial(
        locate(cfg.collate_fn, where),
        padding_idx=tokenizer.pad_id,
        ignore_idx=CROSS_ENTROPY_IGNORE_IDX,
    )
    try:
        make_batch([rows[0]], [0], collate, tokenizer.pad_id)
    except Exception as error:
        raise UserError(
            f"{where}: {cfg.collate_fn} does not collate rows: {reason(error)}"
        ) from error
    return collate
