"""Opens a run's reference cache: what its states depend on, and the folder that this names."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torchtune import utils
from tqdm import tqdm

from emarecipes.command import on_first_process, together
from emarecipes.defenses import Defense
from emarecipes.fingerprint import digest, sha256
from emarecipes.machine import DTYPES
from emarecipes.models._torchtune import is_nf4
from emarecipes.models.batch import make_batch
from emarecipes.models.model_checks import base_files
from emarecipes.training.checked import CheckedRun
from emarecipes.training.reference_cache import (
    ReferenceCache,
    reads_at_targets,
    reference_layers,
    reference_positions,
)
from emarecipes.training.row_store import StoreLayout, open_store

log = utils.get_logger("INFO")

_FORMAT = 1  # Of the files, and of what is computed: raise it when either changes.
# Keys of `model` that shape the adapter alone, which the reference has off.
_ADAPTER_KEYS = frozenset(
    {
        "lora_attn_modules",
        "apply_lora_to_mlp",
        "apply_lora_to_output",
        "lora_rank",
        "lora_alpha",
        "lora_dropout",
        "use_dora",
    }
)


def open_cache(run: CheckedRun, *, quiet: bool) -> ReferenceCache | None:
    """The cache that `cfg.reference_cache` asks for; None if no defense reads a reference.

    Its folder is created at its full size, so that a lack of room shows now. Every process must
    call it: the first alone reads all weights and rows.

    Args:
        run: A run that passed all checks.
        quiet: Show no progress (every process but the first).

    Raises:
        UserError: On every process: the disk has no room for it, or it lacks rows and cannot be
            written.
    """
    defenses = list(run.defenses.values())
    if not any(d.needs_reference for d in defenses):
        return None
    cfg = run.cfg
    key, vectors_N = on_first_process(lambda: _describe(run, defenses, quiet))
    at_targets = reads_at_targets(defenses)
    width = 1 if at_targets else run.meta_model.tok_embeddings.embedding_dim
    stored_as = DTYPES[key["stored_as"]]
    layout = StoreLayout(vectors_N, width, stored_as)
    name = digest(key)[:16]
    folder = Path(cfg.reference_cache) / name
    where = run.origin.at("reference_cache")
    store = together(lambda: open_store(folder, key, layout, where))
    if not quiet:
        log.info(f"Reference cache: {folder} holds {store.num_filled()} of {len(vectors_N)} rows")
    return ReferenceCache(store, defenses, torch.float32 if at_targets else DTYPES[cfg.dtype])


def _describe(run: CheckedRun, defenses: list[Defense], quiet: bool) -> tuple[dict[str, Any], Any]:
    """All that the states depend on, and how many vectors each row has."""
    cfg = run.cfg
    vectors_N, positions = _count_vectors(run, defenses, quiet)
    at_targets = reads_at_targets(defenses)
    key = {
        "format": _FORMAT,
        "torchtune": version("torchtune"),
        "weights": _weights_fingerprint(cfg, quiet),
        "model_type": str(cfg.checkpointer.model_type),
        "model": _base_model(cfg, run.meta_model),
        "dtype": cfg.dtype,
        # One number a token is never rounded: there is little to gain.
        "stored_as": "fp32" if at_targets else cfg.reference_cache_dtype or cfg.dtype,
        **({"holds": "the targets' log-probabilities"} if at_targets else {}),
        "rows": run.rows.fingerprint,
        **({} if cfg.tokenizer.get("date") is None else {"date": str(cfg.tokenizer.date)}),
        "positions": positions,
        "layers": reference_layers(defenses),
    }
    return key, vectors_N


def _count_vectors(run: CheckedRun, defenses: list[Defense], quiet: bool) -> tuple[Any, str]:
    """How many vectors each row has, and a fingerprint of where they are in it."""
    layers = len(reference_layers(defenses))
    vectors_N = np.zeros(len(run.rows), dtype=np.int64)
    found = hashlib.sha256()
    for row in tqdm(range(len(run.rows)), "Positions", unit="row", disable=quiet, leave=False):
        batch = make_batch([run.rows[row]], [row], run.collate, run.tokenizer.pad_id)
        final_BS, hidden_BS = reference_positions(defenses, batch)
        vectors_N[row] = int(final_BS.sum()) + layers * int(hidden_BS.sum())
        # With the bounds of conversations, which a pack's tokens do not tell.
        for tensor in (final_BS, hidden_BS, batch.conversation_BS):
            found.update(tensor.numpy().tobytes())
    return vectors_N, found.hexdigest()


def _weights_fingerprint(cfg: Any, quiet: bool) -> dict[str, str]:
    """SHA-256 of the base's weights and config.json, by file name."""
    found = {}
    paths = base_files(cfg)
    size = sum(path.stat().st_size for path in paths)
    with tqdm(total=size, desc="Weights", unit="B", unit_scale=True, disable=quiet) as bar:
        for path in paths:
            found[path.name] = sha256(path, bar.update)
    return found


def _base_model(cfg: Any, meta_model: Any) -> dict[str, Any]:
    """`cfg.model` without what the adapter alone depends on."""
    entry: Any = OmegaConf.to_container(cfg.model)
    entry.pop("path", None)  # `lora_model`'s folder, whose files are compared.
    # A quantized base is so in the adapted layers only.
    if any(is_nf4(parameter) for parameter in meta_model.parameters()):
        plain: dict[str, Any] = entry
        return plain
    return {key: value for key, value in entry.items() if key not in _ADAPTER_KEYS}
