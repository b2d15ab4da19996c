"""The reference's states on disk: computed once, then read in later epochs and runs.

The reference is frozen and the rows are fixed, so what the defenses read of it never changes: the
last hidden states (normed) where a term on logits acts, and the layers' states where a term on
hidden states does. `reference_cache: DIR` keeps these.

Shapes: B batch, S sequence, T selected positions, V vectors of a row, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch import Tensor
from torchtune import utils
from tqdm import tqdm

from emarecipes.command import on_first_process, together
from emarecipes.defenses import Defense
from emarecipes.errors import UserError
from emarecipes.fingerprint import digest, sha256
from emarecipes.machine import DTYPES
from emarecipes.models._torchtune import is_nf4
from emarecipes.models.batch import Batch, make_batch
from emarecipes.models.model_checks import base_files
from emarecipes.training.row_store import Layout, RowStore, open_store

if TYPE_CHECKING:
    from emarecipes.training.checks import CheckedRun

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

States = tuple[Tensor, dict[int, Tensor]]
"""At the selected positions before the output layer, (T, D), and by layer, (B, S, D)."""


class ReferenceCache:
    """Gives the reference's states of a batch: from disk, or computed and stored there.

    With storage as precise as training, states are those that were computed, bit for bit. They
    depend by rounding on the batch a row was in (its padding, its kernels); once stored, a row's
    stay what they were there.

    Args:
        store: The rows' states: first those before the output layer, then layer by layer.
        defenses: The run's.
        dtype: In which the model computes.
    """

    def __init__(self, store: RowStore, defenses: Iterable[Defense], dtype: torch.dtype) -> None:
        self.store = store
        self._defenses = list(defenses)
        self._layers = reference_layers(self._defenses)
        self._dtype = dtype
        self._can_write = True

    def states(self, batch: Batch, selected_BS: Tensor, forward: Callable[[], States]) -> States:
        """What `forward` returns, where a term with `needs_reference` acts; elsewhere zero (before
        the output layer) or NaN (by layer).

        Under FSDP2 a forward needs every process: if one lacks a row, all compute.

        Args:
            batch: On the model's device.
            selected_BS: The positions that `forward` returns states before the output layer of.
            forward: The reference's.

        Raises:
            UserError: A defense's positions in a row depend on other rows; raised on every process.
        """
        masks = reference_positions(self._defenses, batch)
        final_B, hidden_B = (mask_BS.sum(dim=1).tolist() for mask_BS in masks)
        wrong = self._wrong_row(batch.rows, final_B, hidden_B)
        stored = [self.store.read(row) for row in batch.rows]
        # One number for both questions, for every micro-batch asks them.
        found = -1 if wrong is not None else int(all(states is not None for states in stored))
        lowest = _lowest(found)
        if lowest < 0:
            together(lambda: _refuse(wrong))
        if lowest < 1:
            final_TD, by_layer = forward()
            parts = [final_TD[masks[0][selected_BS]].split(final_B)]
            parts += [by_layer[layer][masks[1]].split(hidden_B) for layer in self._layers]
            for b, row in enumerate(batch.rows):
                if stored[b] is None:
                    vectors_VD = torch.cat([part[b] for part in parts])
                    vectors_VD = vectors_VD.to("cpu", self.store.layout.dtype)
                    self._write(row, vectors_VD)
                    stored[b] = vectors_VD
        sizes = [(n, *[m] * len(self._layers)) for n, m in zip(final_B, hidden_B, strict=True)]
        split = [s.split(size) for s, size in zip(stored, sizes, strict=True) if s is not None]
        final, *layers = [
            torch.cat(part).to(batch.targets_BS.device, self._dtype)
            for part in zip(*split, strict=True)
        ]
        final_TD = final.new_zeros(int(selected_BS.sum()), final.shape[1])
        final_TD[masks[0][selected_BS]] = final
        by_layer = {}
        for layer, values in zip(self._layers, layers, strict=True):
            by_layer[layer] = values.new_full((*selected_BS.shape, values.shape[1]), torch.nan)
            by_layer[layer][masks[1]] = values
        return final_TD, by_layer

    def _wrong_row(self, rows: list[int], final_B: list[int], hidden_B: list[int]) -> int | None:
        """A row with another number of positions than it has alone."""
        for row, final, hidden in zip(rows, final_B, hidden_B, strict=True):
            if final + len(self._layers) * hidden != self.store.layout.vectors_N[row]:
                return row
        return None

    def _write(self, row: int, vectors_VD: Tensor) -> None:
        if not self._can_write:
            return
        try:
            self.store.write(row, vectors_VD)
        except OSError as error:
            self._can_write = False
            log.warning(f"Reference cache: nothing more is stored: {error.strerror}")


def reference_positions(defenses: Iterable[Defense], batch: Batch) -> tuple[Tensor, Tensor]:
    """Boolean (B, S), twice: where terms on logits, and on hidden states, read the reference."""
    final_BS, hidden_BS = (torch.zeros_like(batch.labelled_BS) for _ in range(2))
    for defense in defenses:
        if defense.needs_reference and defense.has("logit_term"):
            final_BS = final_BS | defense.positions(batch)
        if defense.needs_reference and defense.has("hidden_term"):
            hidden_BS = hidden_BS | defense.positions(batch)
    return final_BS, hidden_BS


def reference_layers(defenses: Iterable[Defense]) -> list[int]:
    """The layers at which some defense reads the reference."""
    reading = [d for d in defenses if d.needs_reference and d.has("hidden_term")]
    return sorted({layer for defense in reading for layer in defense.hidden_layers})


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
    width, stored_as = run.meta_model.tok_embeddings.embedding_dim, DTYPES[key["stored_as"]]
    layout = Layout(vectors_N, width, stored_as)
    name = digest(key)[:16]
    folder = Path(cfg.reference_cache) / name
    where = run.origin.at("reference_cache")
    store = together(lambda: open_store(folder, key, layout, where))
    if not quiet:
        log.info(f"Reference cache: {folder} holds {store.num_filled()} of {len(vectors_N)} rows")
    return ReferenceCache(store, defenses, DTYPES[cfg.dtype])


def _describe(run: CheckedRun, defenses: list[Defense], quiet: bool) -> tuple[dict[str, Any], Any]:
    """All that the states depend on, and how many vectors each row has."""
    cfg = run.cfg
    vectors_N, positions = _count_vectors(run, defenses, quiet)
    key = {
        "format": _FORMAT,
        "torchtune": version("torchtune"),
        "weights": _weights_fingerprint(cfg, quiet),
        "model_type": str(cfg.checkpointer.model_type),
        "model": _base_model(cfg, run.meta_model),
        "dtype": cfg.dtype,
        "stored_as": cfg.reference_cache_dtype or cfg.dtype,
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
    # A quantized base is so in the adapted layers only.
    if any(is_nf4(parameter) for parameter in meta_model.parameters()):
        plain: dict[str, Any] = entry
        return plain
    return {key: value for key, value in entry.items() if key not in _ADAPTER_KEYS}


def _refuse(wrong_row: int | None) -> None:
    if wrong_row is not None:
        raise UserError(
            f"reference_cache: a defense acts on other positions of row {wrong_row} than when the "
            "row stands alone; leave reference_cache out with it"
        )


def _lowest(value: int) -> int:
    """The smallest of all processes' values."""
    if not dist.is_initialized():
        return value
    lowest = torch.tensor(value)
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    return int(lowest)
