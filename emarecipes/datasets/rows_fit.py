"""Whether a model takes the rows: their length, and their tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig

from emarecipes.config import Origin
from emarecipes.datasets.rows import Rows
from emarecipes.errors import UserError
from emarecipes.models.config_agreement import sliding_window


def check_rows_fit(cfg: DictConfig, origin: Origin, rows: Rows, model: Any) -> None:
    """Check that the model takes the longest row, padded, and the largest token.

    A row longer than an attention window that torchtune's model leaves out is not computed right.

    Raises:
        UserError: It does not.
    """
    multiple = cfg.pad_to_multiple_of
    if -(-rows.longest // multiple) * multiple > model.max_seq_len >= rows.longest:
        raise UserError(
            f"{origin.at('pad_to_multiple_of')}: pads {rows.longest} tokens to more than the "
            f"{model.max_seq_len} that the model takes"
        )
    if rows.longest > model.max_seq_len:
        raise UserError(
            f"{origin.at('tokenizer')}: a row has {rows.longest} tokens, the model takes "
            f"{model.max_seq_len}; set tokenizer.max_seq_len"
        )
    window = sliding_window(Path(str(cfg.checkpointer.checkpoint_dir)), model)
    if window is not None and rows.longest > window:
        raise UserError(
            f"{origin.at('tokenizer')}: a row has {rows.longest} tokens, and config.json's "
            f"sliding_window of {window} is not computed by this model; set tokenizer.max_seq_len "
            f"to at most {window}"
        )
    vocabulary = model.tok_embeddings.num_embeddings
    if rows.largest_token >= vocabulary:
        raise UserError(
            f"{origin.at('tokenizer')}: gives token {rows.largest_token}, the model's vocabulary "
            f"has {vocabulary}: tokenizer and model do not belong together"
        )


def check_packing(cfg: DictConfig, origin: Origin, model: Any) -> None:
    """Check that packs are no longer than the model takes.

    They are padded to `max_seq_len` when they are made: too large a number takes all memory.

    Raises:
        UserError: They are.
    """
    longest = cfg.tokenizer.get("max_seq_len")
    entries = cfg.dataset if isinstance(cfg.dataset, ListConfig) else [cfg.dataset]
    packed = any(entry.get("packed") for entry in entries)
    if packed and isinstance(longest, int) and longest > model.max_seq_len:
        raise UserError(
            f"{origin.at('tokenizer.max_seq_len')}: packs of {longest} tokens are more than the "
            f"{model.max_seq_len} that the model takes"
        )
