"""config.json by a closed list of keys: what is set and not read is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from emarecipes.errors import UserError, first_line

# Of training elsewhere, of generation, of where the file comes from.
NO_FUNCTION = frozenset(
    {
        *("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"),
        *("_name_or_path", "return_dict", "use_cache", "chunk_size_feed_forward", "id2label"),
        *("label2id", "problem_type", "initializer_range", "attention_dropout", "resid_pdrop"),
        *("embd_pdrop", "max_position_embeddings", "original_max_position_embeddings"),
        *("pretraining_tp", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id"),
        *("decoder_start_token_id", "tokenizer_class", "cache_implementation"),
        *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset"),
        *("is_llama_config", "transformers.js_config", "unsloth_fixed", "unsloth_version"),
        *("task_specific_params", "finetuning_task", "temperature", "top_k", "top_p", "typical_p"),
        *("do_sample", "repetition_penalty", "length_penalty", "num_beams", "num_beam_groups"),
        *("num_return_sequences", "max_length"),
    }
)


# On where a file does not say otherwise: here false and null are what changes the computation.
_ON = frozenset({"is_causal"})  # transformers' attention looks ahead without it.

# Sizes are 64-bit numbers, and products of them.
_LIMIT = 2**31


def does_nothing(key: str, value: Any, neutral: Mapping[str, Any]) -> bool:
    """Whether a field that no model reads leaves what is computed as it is.

    False, 0, null and empty mean that what it is about is switched off.

    Args:
        key: The field.
        value: What it says.
        neutral: Fields, and the value with which each does nothing.
    """
    if key in _ON:
        return bool(value)
    return not value or key in NO_FUNCTION or neutral.get(key) == value


class ConfigJson:
    """The fields of one model's config.json; remembers which were read.

    Args:
        where: The file, for messages.
        values: Its fields.
        defaults: What transformers' class of this family takes for fields that are not there.
    """

    def __init__(
        self, where: str, values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
    ) -> None:
        self.where = where
        self._values = values
        self._defaults = defaults or {}
        self._read: set[str] = set()

    def get(self, key: str) -> Any:
        """A field as it is written, null included, or the family's default."""
        self._read.add(key)
        return self._values.get(key, self._defaults.get(key))

    def size(self, key: str, otherwise: int | None = None) -> int:
        """A whole number above 0; `otherwise` where it is not there or null."""
        value = self.get(key)
        if value is None and otherwise is not None:
            return otherwise
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _LIMIT:
            self._wrong(key, "a whole number above 0", value)
        return value

    def number(self, key: str) -> float:
        """A number above 0."""
        return self._positive(key, self.get(key))

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of numbers above 0."""
        value = self.get(key)
        if not isinstance(value, list) or len(value) != count:
            self._wrong(key, f"a list of {count} numbers", value)
        return tuple(self._positive(key, entry) for entry in value)

    def cap(self, key: str) -> float | None:
        """A number above 0, or None."""
        value = self.get(key)
        return None if value is None else self._positive(key, value)

    def flag(self, key: str) -> bool:
        """true or false; null is false."""
        value = self.get(key)
        if not isinstance(value, bool | None):
            self._wrong(key, "true or false", value)
        return bool(value)

    def one_of(self, key: str, known: Mapping[str, Any]) -> Any:
        """What `known` has for the field's text."""
        value = self.get(key)
        if not isinstance(value, str) or value not in known:
            self._wrong(key, f"one of {', '.join(known)}", value)
        return known[value]

    def entries(self, key: str, count: int, known: Sequence[Any]) -> list[Any] | None:
        """A list with one of `known` for each layer, or None."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) < count:
            self._wrong(key, f"a list of {count}, one a layer", value)
        for entry in value[:count]:
            if entry not in known:
                self._wrong(key, f"a list of {' and '.join(map(str, known))}", entry)
        return value[:count]

    def part(self, key: str) -> ConfigJson:
        """A field that is a mapping, empty where it is not there."""
        value = self.get(key) or {}
        if not isinstance(value, Mapping):
            self._wrong(key, "a mapping", value)
        return ConfigJson(f"{self.where}: {key}", value)

    def check_all_read(self, neutral: Mapping[str, Any] | None = None) -> None:
        """Check that no other field is set.

        Args:
            neutral: Fields, and the value with which each does nothing.

        Raises:
            UserError: One is, see `does_nothing`.
        """
        for key, value in self._values.items():
            if key not in self._read and not does_nothing(key, value, neutral or {}):
                raise UserError(
                    f"{self.where}: {key} is {value!r:.60}, and it is not known that the model "
                    "computes the same"
                )

    def refuse(self, key: str, why: str) -> NoReturn:
        """Raise the error that names a field."""
        raise UserError(f"{self.where}: {key} is {self.get(key)!r:.60}, {why}")

    def _positive(self, key: str, value: Any) -> float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # json reads Infinity and NaN; a larger whole number is no float.
        if not is_number or not 0 < value < float(2**1000):
            self._wrong(key, "a number above 0", value)
        return float(value)

    def _wrong(self, key: str, right: str, value: Any) -> NoReturn:
        raise UserError(f"{self.where}: {key} must be {right}, not {value!r:.60}")


def read_json(folder: Path) -> dict[str, Any]:
    """A model folder's config.json.

    Raises:
        UserError: It is not there, or is no JSON mapping.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(
            f"no such folder: {folder}; get the model as the config's header says, or point to it"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no config.json; give a Hugging Face model folder") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a mapping")
    return found
