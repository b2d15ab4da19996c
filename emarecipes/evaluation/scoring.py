"""Token likelihoods of given answers under a base model and adapters of it, each computed once."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf
from torchtune.utils import get_device

from emarecipes.defenses import ModelSource
from emarecipes.errors import UserError, first_line
from emarecipes.files import whole
from emarecipes.fingerprint import adapter_content, digest, sampled_digest
from emarecipes.models.adapters.read import check_adapter, load_adapter
from emarecipes.models.likelihoods import GivenAnswers
from emarecipes.models.loss_head import LossHead
from emarecipes.models.sampling.given import nll_by_prompt
from emarecipes.models.source import load_model
from emarecipes.probes.contrast import AnswerRow
from emarecipes.progress import Progress
from emarecipes.stop import stoppable

TokenNLLs = NDArray[np.float32]

_KEPT = "likelihoods so far are kept; the same command goes on"
# Batches after which what was computed is written, so that little is lost with a killed run.
_BATCHES_A_SAVE = 16


class NotFiniteError(UserError):
    """A likelihood is NaN or infinite, as after a training run that diverged."""


class Scorer:
    """Scores rows under one base and any number of its adapters.

    The base is loaded once, and only when something has to be computed. Results go into one file an
    adapter, under the content of the row, the adapter and the base: what was computed for the same
    contents is read back, whatever the files are called.

    Args:
        cfg: With `model`, `checkpointer`, `dtype`, `device`.
        source: The model on the meta device and its folder, see `check_model`.
        pad_id: The tokenizer's padding token.
        batch_size: Rows at a time. In float32 it moves an NLL by some 1e-5.
        pad_to_multiple_of: Row lengths are rounded up to a multiple of this.
    """

    def __init__(
        self,
        cfg: DictConfig,
        source: ModelSource,
        pad_id: int,
        *,
        batch_size: int = 8,
        pad_to_multiple_of: int = 8,
    ) -> None:
        self._cfg, self._source, self._pad_id = cfg, source, pad_id
        self._batch_size, self._multiple = batch_size, pad_to_multiple_of
        self._head: LossHead | None = None
        self._current: Path | None = None
        base = Path(cfg.checkpointer.checkpoint_dir)
        weights = sorted([*base.glob("*.safetensors"), *base.glob("*.bin"), base / "config.json"])
        self.base_fingerprint = digest(
            OmegaConf.to_container(cfg.model), cfg.dtype, sampled_digest(weights)
        )

    def token_nlls(
        self,
        rows: Sequence[AnswerRow],
        adapter: Path | None,
        cache: Path,
        bar: Progress | None = None,
    ) -> list[TokenNLLs]:
        """-log p of each answer token, in nats: one array (answer's tokens,) a row.

        Args:
            rows: What to score.
            adapter: PEFT folder; None for the reference, the base alone.
            cache: The .npz file that holds what is known, and gets what is not.
            bar: Of a work that these rows are a part of; None: they have one of their own.

        Raises:
            UserError: The adapter does not belong on the base, or the cache is broken.
            NotFiniteError: An NLL is not finite.
        """
        keys, known = self._keys(rows, adapter), read_nlls(cache)
        todo = {key: row for key, row in zip(keys, rows, strict=True) if key not in known}
        if todo:
            with nullcontext(bar) if bar else Progress(total=len(todo), unit="row") as shown:
                self._compute(todo, adapter, known, cache, shown)
        return [known[key] for key in keys]

    def missing(self, rows: Sequence[AnswerRow], adapter: Path | None, cache: Path) -> int:
        """Rows whose likelihoods are not known yet, each once; see `token_nlls`."""
        return len({*self._keys(rows, adapter)} - read_nlls(cache).keys())

    def _keys(self, rows: Sequence[AnswerRow], adapter: Path | None) -> list[str]:
        # The rank and alpha of cfg.model are in the base's digest, though the reference has none.
        mark = digest(self.base_fingerprint, self.adapter_fingerprint(adapter))
        return [digest(mark, row.tokens, row.labels)[:32] for row in rows]

    def adapter_fingerprint(self, adapter: Path | None) -> str:
        """SHA-256 of an adapter's files; "" for the reference.

        Raises:
            UserError: See `check_adapter`.
        """
        if adapter is None:
            return ""
        check_adapter(adapter, self._source)
        return adapter_content(adapter)

    def _compute(
        self,
        todo: dict[str, AnswerRow],
        adapter: Path | None,
        known: dict[str, TokenNLLs],
        cache: Path,
        bar: Progress,
    ) -> None:
        head = self.head(adapter)
        names = list(todo)
        device = get_device(self._cfg.device or "cpu")
        samples = [row.sample for row in todo.values()]
        answers = GivenAnswers(samples, self._pad_id, self._multiple, device)
        batches = -(-len(todo) // self._batch_size)
        bar.set_description("reference" if adapter is None else adapter.parent.name, refresh=False)
        with stoppable(_KEPT, in_batches=True) as stop:
            found = nll_by_prompt(answers, head, self._batch_size, reference=adapter is None)
            for number, (rows, nll_T, tokens_B) in enumerate(found, start=1):
                keys = [names[row] for row in rows]
                for key, values in zip(keys, nll_T.split(tokens_B.tolist()), strict=True):
                    if not values.isfinite().all():
                        folder = (
                            self._cfg.checkpointer.checkpoint_dir if adapter is None else adapter
                        )
                        raise NotFiniteError(f"{folder}: an answer's likelihood is not finite")
                    known[key] = values.numpy().astype(np.float32)
                if number % _BATCHES_A_SAVE == 0 or number == batches or stop.asked:
                    write_nlls(cache, known)
                bar.update(len(keys))
                stop.heed()

    def head(self, adapter: Path | None) -> LossHead:
        """The model's loss head, with an adapter in place; None leaves any that is there.

        For the reference call the model inside `reference_where`.
        """
        if self._head is None:
            self._head = LossHead(load_model(self._cfg))
        if adapter is not None and adapter != self._current:
            load_adapter(self._head.model, adapter, self._source)
            self._current = adapter
        return self._head


def read_nlls(path: Path) -> dict[str, TokenNLLs]:
    """The likelihoods of rows that a file keeps, by their digest; none without the file.

    Raises:
        UserError: It is broken.
    """
    if not path.exists():
        return {}
    try:
        with np.load(path, allow_pickle=False) as file:
            keys, counts, values = file["keys"], file["counts"], file["values"]
        parts = np.split(values, np.cumsum(counts)[:-1])
        return dict(zip(keys.tolist(), parts, strict=True))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: a broken cache ({first_line(error)}); delete it") from None


def write_nlls(path: Path, known: dict[str, TokenNLLs]) -> None:
    """Keep likelihoods of rows, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial_path, partial_path.open("wb") as file:
        np.savez(
            file,
            keys=np.array(list(known)),
            counts=np.array([len(values) for values in known.values()]),
            values=np.concatenate(list(known.values())),
        )
