"""Whether a run may go on from a checkpoint, and which; found out before weights are loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from torchtune import utils

from emarecipes.config import Origin
from emarecipes.datasets.rows import Rows
from emarecipes.errors import UserError
from emarecipes.fingerprint import named_files, sampled_digest
from emarecipes.models.model_checks import base_files
from emarecipes.output_dir import CHECKPOINTS, run_files
from emarecipes.provenance import environment
from emarecipes.training.checkpoint import Checkpoint, newest_checkpoint, read_checkpoint
from emarecipes.training.settings import Settings

log = utils.get_logger("INFO")

_Found = TypeVar("_Found")

# Keys that change no step of the run: a resumed one may have others.
_HARMLESS = re.compile(
    r"output_dir|checkpointer\.output_dir|metric_logger.*|profiler.*|log_\w+|provenance.*"
    r"|save_every_n_steps|keep_last|resume|overwrite|skip_nonfinite|resume_from_checkpoint"
    r"|save_merged|merged_dtype|adapter_scaling|save_adapter_weights_only|probe.*"
    # Where and how the same numbers are computed.
    r"|device|low_cpu_ram|enable_activation_\w+|fsdp|fsdp_\w+|custom_sharded_layers.*"
    # Files whose content is compared by the rows that they give.
    r"|(dataset|dataset\..*)\.data_files.*|tokenizer\.(path|merges_file)"
)
# Unless the probe may end the run: where it does is part of what the run is.
_OF_STOP = re.compile(r"probe\.(?!batch_size|suites\.\w+\.(pairs|good|bad|training_questions)).+")
_PROBE = "probe.stop"  # No defense's name has a point.
_BATCH = ("batch_size", "gradient_accumulation_steps")


def find_checkpoint(cfg: DictConfig, origin: Origin) -> Checkpoint | None:
    """The checkpoint that `resume` asks for; None if the run starts from its beginning.

    Raises:
        UserError: The named one is not there or damaged; all are damaged; the output folder holds a
            run from which nothing can be resumed.
    """
    if cfg.resume is None:
        return None
    where, folder = origin.at("resume"), Path(cfg.output_dir)
    present = run_files(folder)
    if cfg.resume != "auto":
        path = Path(cfg.resume)
        if not path.is_dir():
            raise UserError(f"{where}: no such checkpoint folder: {path}")
        if (
            path.resolve().parent != (folder / CHECKPOINTS).resolve()
            and present
            and not cfg.overwrite
        ):
            raise UserError(
                f"{where}: {path} is not of the run that {folder} holds; choose another output_dir"
            )
        return _placed(where, read_checkpoint, path)
    found = _placed(where, newest_checkpoint, folder / CHECKPOINTS)
    if found is None and present and not cfg.overwrite:
        if {"adapter", "merged"} & set(present):
            raise UserError(
                f"{where}: {folder} holds a run without checkpoints, so there is nothing to resume;"
                " choose another output_dir, or say overwrite=true to replace it"
            )
        log.warning(f"{folder} holds a run without a checkpoint: starting from step 1")
    return found


def check_same_run(
    cfg: DictConfig, checkpoint: Checkpoint, origin: Origin, world_size: int
) -> None:
    """Check that the config trains as the checkpoint's did, and share out its steps' rows.

    A step keeps its rows. Where the number of processes has changed, `batch_size` and
    `gradient_accumulation_steps` of `cfg` are set so that they still hold all of them.

    Raises:
        UserError: A key that changes the result has another value; a step's rows cannot be shared.
    """
    where, stored = origin.at("resume"), checkpoint.run
    # A run that is older than a key did what the key says by default.
    unknown_then = {
        key: field.get_default(call_default_factory=True)
        for key, field in Settings.model_fields.items()
        if key not in stored["config"]
    }
    before = dict(_flat(unknown_then | stored["config"]))
    now = dict(_flat(plain_config(cfg)))
    if "tokenizer.date" in now:  # The rows tell whether it is that of an older run.
        before.setdefault("tokenizer.date", now["tokenizer.date"])
    if cfg.seed is None:
        cfg.seed = now["seed"] = before["seed"]
    stops = any(key.startswith("probe.stop.") for key in now)
    changed = {
        key
        for key in before.keys() | now.keys()
        if before.get(key) != now.get(key)
        and (not _HARMLESS.fullmatch(key) or (stops and _OF_STOP.fullmatch(key)))
    }
    if int(now["epochs"]) > int(before["epochs"]):
        changed.discard("epochs")
    wanted = int(stored["rows_per_step"])
    if cfg.batch_size * cfg.gradient_accumulation_steps * world_size == wanted:
        changed -= set(_BATCH)
    elif not changed & set(_BATCH) and world_size != stored["processes"]:
        _share_out(cfg, wanted, world_size, where)
    elif not changed & set(_BATCH):
        raise UserError(
            f"{where}: {checkpoint.path} has {wanted} rows a step; batch_size x "
            "gradient_accumulation_steps x processes must give the same"
        )
    if changed:
        diff = "; ".join(
            f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in sorted(changed)
        )
        raise UserError(
            f"{where}: not the run of {checkpoint.path}, these keys change the result: {diff}. "
            "Set them back, or train anew in another output_dir"
        )
    packages = environment()["packages"]
    for name, version in stored["packages"].items():
        if packages.get(name) != version:
            log.warning(
                f"{name} was {version} before, now it is {packages.get(name)}: rounding may differ"
            )


def check_same_rows(cfg: DictConfig, rows: Rows, checkpoint: Checkpoint, origin: Origin) -> None:
    """Check that the data give the rows that they gave before.

    Raises:
        UserError: They do not.
    """
    if rows.fingerprint != checkpoint.run["rows_fingerprint"]:
        undated = "date" not in checkpoint.run["config"]["tokenizer"]
        hint = ""
        if undated and cfg.tokenizer.get("date") is not None:
            hint = " (the chat template prints a date: give the day it began as tokenizer.date)"
        raise UserError(
            f"{origin.at('dataset')}: the rows are not those of {checkpoint.path}: data or "
            f"tokenizer have changed{hint}. Put them back, or train anew in another output_dir"
        )


def check_same_base(cfg: DictConfig, checkpoint: Checkpoint, origin: Origin) -> None:
    """Check that the frozen model is the one that the adapter was trained on.

    Raises:
        UserError: A file of it has changed.
    """
    now = base_fingerprint(cfg)
    # A checkpoint of an older version does not say; it is taken at its word.
    before = checkpoint.run.get("base", now)
    changed = sorted(name for name in before.keys() | now if before.get(name) != now.get(name))
    if changed:
        raise UserError(
            f"{origin.at('checkpointer.checkpoint_dir')}: {', '.join(changed)} in "
            f"{cfg.checkpointer.checkpoint_dir} changed since {checkpoint.path} was written: not "
            "the base that its adapter belongs to. Put the files back, or train anew in another "
            "output_dir"
        )


def check_same_defense_files(cfg: DictConfig, checkpoint: Checkpoint, origin: Origin) -> None:
    """Check that what the defenses read (vectors, adapters, models) is what they read before.

    So too of what the probe reads that may end the run.

    Raises:
        UserError: A file of one has changed.
    """
    now = defense_fingerprint(cfg)
    before = checkpoint.run.get("defense_files", now)  # As of the base.
    for name in (*cfg.defenses, _PROBE):
        if name in now and before.get(name) != now[name]:
            key = name if name == _PROBE else f"defenses.{name}"
            raise UserError(
                f"{origin.at(key)}: a file that it reads changed since "
                f"{checkpoint.path} was written. Put it back, or train anew in another output_dir"
            )


def defense_fingerprint(cfg: DictConfig) -> dict[str, str]:
    """By name, a digest of all files that a defense's entry names; of weights as of the base's.

    Also, as `probe.stop`, of what the probe reads that may end the run.
    """
    entries: Any = OmegaConf.to_container(cfg.defenses)
    if cfg.probe is not None and cfg.probe.get("stop") is not None:
        entries[_PROBE] = OmegaConf.to_container(cfg.probe.suites)
    files = {name: named_files(entry) for name, entry in entries.items()}
    return {str(name): sampled_digest(of) for name, of in files.items() if of}


def base_fingerprint(cfg: DictConfig) -> dict[str, str]:
    """A digest of each file of the frozen model, of parts of its weights: see `sampled_digest`.

    All of them, as the reference cache takes, would cost every start a second a gigabyte.
    """
    return {path.name: sampled_digest([path]) for path in base_files(cfg)}


def describe_run(
    cfg: DictConfig, stated: dict[str, Any], rows: Rows, world_size: int
) -> dict[str, Any]:
    """What a checkpoint's `run.json` says so that the checks above can be made.

    Args:
        cfg: The run's config, with the seed that was drawn.
        stated: The config before `check_same_run` shared out a step's rows.
        rows: The data.
        world_size: Number of processes.
    """
    return {
        "processes": world_size,
        "rows_per_step": cfg.batch_size * cfg.gradient_accumulation_steps * world_size,
        "rows_fingerprint": rows.fingerprint,
        "base": base_fingerprint(cfg),
        "defense_files": defense_fingerprint(cfg),
        "packages": environment()["packages"],
        "config": stated | {"seed": cfg.seed},
    }


def plain_config(cfg: DictConfig) -> dict[str, Any]:
    """The keys that the recipe knows, as JSON gives them back."""
    plain: Any = OmegaConf.to_container(cfg)
    known: dict[str, Any] = json.loads(json.dumps({k: plain.get(k) for k in Settings.model_fields}))
    return known


def _placed(where: str, read: Callable[[Path], _Found], path: Path) -> _Found:
    try:
        return read(path)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _share_out(cfg: DictConfig, rows: int, world_size: int, where: str) -> None:
    each, left = divmod(rows, world_size)
    if left:
        raise UserError(
            f"{where}: a step of this run has {rows} rows, which {world_size} processes cannot "
            "share evenly; use another number of processes"
        )
    batch_size = max(size for size in range(1, cfg.batch_size + 1) if each % size == 0)
    cfg.batch_size, cfg.gradient_accumulation_steps = batch_size, each // batch_size
    log.info(
        f"A step keeps its {rows} rows: now batch_size {batch_size} x "
        f"gradient_accumulation_steps {each // batch_size} x {world_size} process(es)"
    )


def _flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values; an empty mapping or list is a value."""
    if isinstance(node, dict | list) and node:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node
