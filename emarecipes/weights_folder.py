"""A model folder's weights, read one tensor at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from emarecipes.errors import UserError, first_line

_MAPPED_BYTES = 2**25
# As safetensors names them. Others are of quantized weights, whose scales stand elsewhere.
_PLAIN_DTYPES = ("F64", "F32", "F16", "BF16")
# Models of text and images were stored under other names than transformers gives them since 4.52.
_RENAMED = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}


def check_stored_dtype(file: Path, name: str, dtype: str) -> None:
    """Check that a tensor is stored as plain numbers.

    Raises:
        UserError: It is not: integers, or floats of 8 bits.
    """
    if dtype not in _PLAIN_DTYPES:
        raise UserError(
            f"{file}: {name} is stored as {dtype}, which is of quantized weights; read are "
            f"{', '.join(_PLAIN_DTYPES)}"
        )


class WeightsFolder:
    """The safetensors of a Hugging Face model folder, one file or several with an index.

    Args:
        path: The folder.

    Raises:
        UserError: No such folder, no safetensors in it, a file that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise UserError(f"no such folder: {path}")
        index = path / "model.safetensors.index.json"
        if index.is_file():
            files = _read_index(index)
        else:
            files = {}
            for file in sorted(path.glob("*.safetensors")):
                try:
                    with safe_open(file, framework="pt") as opened:
                        names = opened.offset_keys()
                except (SafetensorError, OSError) as error:
                    raise UserError(f"{file}: cannot be read: {error}") from None
                twice = [name for name in names if name in files]
                if twice:
                    raise UserError(
                        f"{path}: {files[twice[0]]} and {file.name} both have {twice[0]}; keep "
                        "those files alone that the model is made of"
                    )
                files |= dict.fromkeys(names, file.name)
        if not files:
            raise UserError(f"{path}: holds no .safetensors weights")
        self._stored = {_today(name): name for name in files}
        self._files = {_today(name): file for name, file in files.items()}
        self._opened: dict[str, Any] = {}
        self._bytes_read = 0

    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """A tensor's shape, from the file's header; None if the folder does not have it."""
        if name not in self._files:
            return None
        try:
            part = self._open(name).get_slice(self._stored[name])
        except SafetensorError:
            raise UserError(
                f"{self.path / self._files[name]}: has no {self._stored[name]}, which the index "
                "says is there; get the model's files again"
            ) from None
        check_stored_dtype(self.path / self._files[name], name, part.get_dtype())
        return tuple(part.get_shape())

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored, on the CPU."""
        tensor: Tensor = self._open(name).get_tensor(self._stored[name])
        # Pages that were read stay mapped, and count as memory, until the file is closed.
        self._bytes_read += tensor.nbytes
        if self._bytes_read > _MAPPED_BYTES:
            self._opened.clear()
            self._bytes_read = 0
        return tensor

    def _open(self, name: str) -> Any:
        """The file that holds a tensor; opening reads its header only."""
        file = self._files[name]
        if file not in self._opened:
            try:
                self._opened[file] = safe_open(self.path / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{self.path / file}: cannot be read: {error}") from None
        return self._opened[file]


def _read_index(path: Path) -> dict[str, str]:
    """Files' names by tensor.

    Raises:
        UserError: It is no index.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from None
    files = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise UserError(f"{path}: weight_map must give the name of a file for each tensor")
    return files


def _today(name: str) -> str:
    """A tensor's name as transformers has it in memory."""
    for prefix, today in _RENAMED.items():
        if name.startswith(prefix):
            return today + name.removeprefix(prefix)
    return name


class Difference:
    """One tensor of a folder minus that of another, float32.

    The result is written over that of the call before: fresh pages for every matrix would cost as
    much as the subtraction.
    """

    def __init__(self, minuend: WeightsFolder, subtrahend: WeightsFolder) -> None:
        self._minuend, self._subtrahend = minuend, subtrahend
        self._buffer = torch.empty(0, dtype=torch.float32)

    def __call__(self, name: str) -> Tensor:
        """The difference of the two tensors called `name`.

        Raises:
            UserError: It is not finite.
        """
        tensor = self._minuend.read(name)
        if self._buffer.numel() < tensor.numel():
            self._buffer = torch.empty(tensor.numel(), dtype=torch.float32)
        found = self._buffer[: tensor.numel()].view(tensor.shape).copy_(tensor)
        found.sub_(self._subtrahend.read(name))
        if not math.isfinite(float(found.sum())):
            raise UserError(
                f"{name} is not finite in {self._minuend.path} or {self._subtrahend.path}"
            )
        return found
