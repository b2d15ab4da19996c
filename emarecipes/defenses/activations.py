"""What defenses share that change the policy's activations in training: when, and their files."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from torch import Tensor
from torchtune import utils

from emarecipes.defenses.base import Defense
from emarecipes.errors import UserError
from emarecipes.models.source import ModelSource

if TYPE_CHECKING:
    from emarecipes.models.batch import Batch

log = utils.get_logger("INFO")


class ActivationDefense(Defense):
    """A defense whose hooks act in the policy's training forward, and in no other.

    Attributes:
        acts: Whether this is that forward.
        labelled_BS: In that forward, the batch's positions whose next token is trained.
        inner_BS: Likewise, a conversation's tokens without its first, whose state is often a
            hundred times as large as others: what sizes are told of.
    """

    acts = False
    labelled_BS: Tensor
    inner_BS: Tensor

    @contextmanager
    def policy_forward(self, batch: Batch) -> Iterator[None]:
        """Within this context its hooks act."""
        self.acts, self.labelled_BS = True, batch.labelled_BS
        self.inner_BS = (batch.conversation_BS >= 0) & ~batch.first_BS
        try:
            yield
        finally:
            self.acts = False


def tell_other_model(
    path: Path, made_with: str | None, source: ModelSource, key: str = "vectors"
) -> None:
    """Warn of directions that another model's folder gave; a copy may have another name.

    Args:
        path: Their file.
        made_with: From `read_tensor`.
        source: What is trained.
        key: What names the file in the config.
    """
    here = source.checkpoint_dir.resolve().name
    if made_with not in (None, here):
        utils.log_rank_zero(
            log,
            f"{key}: {path} was made with {made_with}, and {here} is trained: a direction of "
            "another model means nothing in this one",
            level=logging.WARNING,
        )


def read_tensor(path: Path, name: str, key: str = "vectors") -> tuple[Tensor, str | None]:
    """A tensor of a file that `recipes/ema_persona.py` writes, or a user.

    Args:
        path: The file.
        name: The tensor's.
        key: What names the file in the config, for messages.

    Returns:
        It, and the model's folder that it was made with, where the file says so.

    Raises:
        UserError: No such file, or no such tensor in it.
    """
    if not path.is_file():
        raise UserError(
            f"{key}: no such file: {path}; make it with recipes/ema_persona.py, as the config's "
            "header says"
        )
    try:
        with safe_open(path, framework="pt") as file:
            if name not in file.keys():  # noqa: SIM118 (not a dict)
                raise UserError(f"{key}: {path} has no tensor {name}; it has {file.keys()}")
            tensor: Tensor = file.get_tensor(name)
            return tensor, (file.metadata() or {}).get("model")
    except SafetensorError as error:
        raise UserError(f"{key}: {path} is no safetensors file: {error}") from None
