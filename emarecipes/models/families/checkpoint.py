"""A model folder's weights under torchtune's names, in the place of torchtune's checkpointers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchtune import training

from emarecipes.errors import UserError
from emarecipes.models.families.known import VISION_PREFIXES, read_shape
from emarecipes.models.families.names import Names
from emarecipes.weights_folder import WeightsFolder

_OUTPUT, _EMBEDDING = "output.weight", "tok_embeddings.weight"


class FolderCheckpointer:
    """Reads a folder for `lora_model`; a config with that has no `checkpointer` of its own.

    Args:
        checkpoint_dir: The folder: config.json and safetensors, one file or several with an index.
        model_type: CONFIG_JSON.
        output_dir: Not used; recipes give it.
        should_load_recipe_state: Likewise.
    """

    def __init__(
        self,
        checkpoint_dir: str,
        model_type: str = "CONFIG_JSON",
        output_dir: str | None = None,
        should_load_recipe_state: bool = False,
    ) -> None:
        self._folder = Path(checkpoint_dir)

    def load_checkpoint(self) -> dict[str, Any]:
        """The weights, mapped from the files: they are read when they are copied.

        Raises:
            UserError: See `shapes`.
        """
        return {training.MODEL_KEY: self._state(WeightsFolder(self._folder), on_meta=False)}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The weights' shapes from the files' headers.

        Raises:
            UserError: Files cannot be read; weights are quantized, of another family, or two where
                config.json says that they are one.
        """
        weights = WeightsFolder(self._folder)
        state = self._state(weights, on_meta=True)
        if _OUTPUT in state and read_shape(self._folder).tied:
            if _EMBEDDING in state:  # Else it is missing, as whoever compares shapes will say.
                self._check_tied(weights)
            del state[_OUTPUT]
        return {name: tuple(tensor.shape) for name, tensor in state.items()}

    def _state(self, weights: WeightsFolder, *, on_meta: bool) -> dict[str, Tensor]:
        shape = read_shape(self._folder)
        names = Names(shape)
        state: dict[str, Tensor] = {}
        for hf_name in weights.names():
            if names.is_left_alone(hf_name):
                continue
            stored = weights.shape(hf_name)  # Checks the type too.
            assert stored is not None
            tensor = torch.empty(stored, device="meta") if on_meta else weights.read(hf_name)
            found = names.own(hf_name, tensor)
            if found is None:
                raise UserError(
                    f"{self._folder}: {hf_name} is not of a {shape.family} model as its "
                    "config.json describes it"
                )
            state |= found
        if not on_meta and shape.tied:
            state.pop(_OUTPUT, None)
        return state

    def _check_tied(self, weights: WeightsFolder) -> None:
        shape = read_shape(self._folder)
        output, embedding = "lm_head.weight", f"{shape.prefix}embed_tokens.weight"
        if not torch.equal(weights.read(output), weights.read(embedding)):
            raise UserError(
                f"{self._folder / 'config.json'}: tie_word_embeddings is true, and {output} is not "
                f"{embedding}"
            )


def image_tensors(folder: Path, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """What a model of text and images has beside the text's weights, one at a time.

    A merged model needs it to be whole; training leaves it as it is.
    """
    weights = WeightsFolder(folder)
    for name in weights.names():
        if name.startswith(VISION_PREFIXES):
            yield name, weights.read(name).to(dtype)
