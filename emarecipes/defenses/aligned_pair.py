"""What alignment changed in the weights: an aligned model's folder beside its unaligned base's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from emarecipes.errors import UserError
from emarecipes.models.adapters.layout import ModuleRows, adapter_modules
from emarecipes.models.source import ModelSource
from emarecipes.weights_folder import Difference, WeightsFolder


class AlignedPair:
    """Two model folders, whose weights differ by what alignment did: V = W_aligned - W_base.

    Args:
        base_dir: The unaligned model's folder.
        aligned_dir: The aligned model's.
    """

    def __init__(self, base_dir: str, aligned_dir: str) -> None:
        self._base_dir, self._aligned_dir = Path(base_dir), Path(aligned_dir)

    def open(self, hf_shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Open both folders and check them against the shapes of adapted weights, by name.

        Raises:
            UserError: A folder or weight is missing, shapes differ, or both hold the same weights.
        """
        for key, path in (("base_dir", self._base_dir), ("aligned_dir", self._aligned_dir)):
            if not path.is_dir():
                raise UserError(f"{key}: no such folder: {path}")
        if self._base_dir.resolve() == self._aligned_dir.resolve():
            raise UserError(f"base_dir and aligned_dir are the same folder, {self._base_dir}")
        self._base, self._aligned = WeightsFolder(self._base_dir), WeightsFolder(self._aligned_dir)
        for key, folder in (("base_dir", self._base), ("aligned_dir", self._aligned)):
            for name, expected in hf_shapes.items():
                if (shape := folder.shape(name)) != expected:
                    raise UserError(
                        f"{key}: {folder.path}: {name} is {_size(shape)}, the model's is "
                        f"{_size(expected)}"
                    )
        self._probe = _a_few(list(hf_shapes))
        changed = self.difference()
        if any(changed(name).any() for name in self._probe):
            return
        # Alignment may have changed few of them.
        other = next((name for name in hf_shapes if changed(name).any()), None)
        if other is None:
            raise UserError(
                f"base_dir {self._base_dir} and aligned_dir {self._aligned_dir} hold the same "
                "weights: there is nothing that alignment changed"
            )
        self._probe.append(other)

    def check(self, source: ModelSource, defense: str, does: str) -> dict[str, ModuleRows]:
        """Open the folders, check them against the model, and find its adapted layers in them.

        Args:
            source: The model.
            defense: Whose pair it is, and
            does: what it does to an update, for messages.

        Returns:
            Which rows of which weight each adapted layer is, by torchtune's name.

        Raises:
            UserError: See `open`; the folders are swapped; the adapter is DoRA's.
        """
        names = [name for name, _ in source.meta_model.named_parameters()]
        if any(name.endswith("magnitude") for name in names):
            raise UserError(
                f"{defense} {does} an update B A; DoRA's also rescales each row, so this is not "
                f"all of it. Use LoRA, or leave {defense} out"
            )
        modules = adapter_modules(source.meta_model, source.model_type, source.checkpoint_dir)
        self.open({m.hf_name: m.hf_shape for m in modules.values()})
        self.check_trained(source.checkpoint_dir)
        return modules

    def check_trained(self, folder: Path) -> None:
        """Check that what is trained, or was, is not the unaligned base.

        Raises:
            UserError: It is, so the folders are swapped.
        """
        trained = WeightsFolder(folder)
        if self._same(trained, self._base) and not self._same(trained, self._aligned):
            raise UserError(
                f"base_dir {self._base_dir} holds the model that is trained, and aligned_dir does "
                "not: are they swapped? The trained model is the aligned one"
            )

    def difference(self) -> Difference:
        """V of one weight at a time, by its name in the folders."""
        return Difference(self._aligned, self._base)

    def _same(self, one: WeightsFolder, other: WeightsFolder) -> bool:
        return all(
            one.shape(name) is not None and torch.equal(one.read(name), other.read(name))
            for name in self._probe
        )


def _a_few(names: list[str]) -> list[str]:
    """Up to four of them, spread over the depth."""
    return names[:: max(1, len(names) // 4)][:4]


def _size(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape))
