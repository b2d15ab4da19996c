"""What the plain values of every recipe's config are checked by, and what all recipes read."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from omegaconf import DictConfig, OmegaConf
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from emarecipes.config import Origin, suggestion
from emarecipes.errors import UserError

Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Entry = dict[str, Any]
Dtype = Literal["auto", "bf16", "fp32"]

# Logits over less than this leave float32.
_LEAST_TEMPERATURE = 0.001


def _divides(temperature: float) -> float:
    if 0 < temperature < _LEAST_TEMPERATURE:
        raise PydanticCustomError("temperature", f"0, or at least {_LEAST_TEMPERATURE}")
    return temperature


Temperature = Annotated[float, Field(ge=0, allow_inf_nan=False), AfterValidator(_divides)]


class Keys(BaseModel):
    """Keys of a config, or of one of its entries; the text below a key is its meaning.

    `python -m emarecipes.keys` prints it, and the tables in `docs/` are made of it. It reads them
    itself: pydantic would look for them at every import, a quarter of a second.
    """

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class ModelSettings(Keys):
    """What every recipe reads: a model, where it comes from, and where results go."""

    output_dir: Annotated[str, Field(min_length=1)]
    """The run's folder."""
    model: Entry
    """Component: `emarecipes.models.lora_model` for any folder of a known family (docs/models.md),
    or torchtune's builder of a decoder with LoRA."""
    tokenizer: Entry
    """Component: text to tokens, by the chat template of the model."""
    checkpointer: Entry
    """Component, which only loads. The saved adapter refers to its Hugging Face folder. Left out
    with `lora_model`, which knows the folder."""
    seed: Seed | None = None
    """Fixes what is drawn at random; null draws one and writes it down."""
    device: str | None = None
    """`cpu` or `cuda`; null: what is found."""
    dtype: Dtype = "auto"
    """Of weights and products; auto: bf16 where the device computes it natively, else fp32
    (docs/configs.md#dtype-and-threads)."""
    overwrite: bool = False
    """Replace what `output_dir` holds; else such a folder is refused."""


_Kind = TypeVar("_Kind", bound=BaseModel)


def parse_settings(cfg: DictConfig, origin: Origin, kind: type[_Kind], within: str = "") -> _Kind:
    """Check the top level of a config against a recipe's settings and fill in defaults.

    A key that the recipe does not know is refused, unless another value refers to it as `${key}`.
    Such a variable is left out: its value is where it was referred to. So a written config, in
    which nothing refers to it any more, can be run again.

    Args:
        cfg: The config, or one of its entries.
        origin: Where it was written.
        kind: The settings.
        within: The entry's key; inside an entry no key is a variable.

    Raises:
        UserError: An unknown or missing key, a value of a wrong type or out of range.
    """
    plain: Any = OmegaConf.to_container(cfg)
    prefix = f"{within}." if within else ""
    if not within:
        plain = {
            k: v for k, v in plain.items() if k in kind.model_fields or k not in origin.variables
        }
    for key in plain:
        if key in kind.model_fields:
            continue
        hint = suggestion(key, kind.model_fields)
        allowed = (
            f"known are {', '.join(kind.model_fields)}"
            if within
            else f"a name of your own is allowed if another value refers to it as ${{{key}}}"
        )
        raise UserError(f"{origin.at(f'{prefix}{key}')}: unknown key{hint}; {allowed}")
    try:
        return kind.model_validate(plain)
    except ValidationError as error:
        raise UserError(_explain(error, origin, prefix)) from None


# Keys whose own keys are names that the user chose.
_MAPPINGS = ("defenses", "adapters", "answers", "probes", "suites")


def _explain(error: ValidationError, origin: Origin, prefix: str) -> str:
    first = error.errors()[0]
    key = f"{prefix}{first['loc'][0]}"
    if first["loc"][0] in _MAPPINGS and len(first["loc"]) > 1:
        key = f"{key}.{first['loc'][1]}"
    value = first["input"]
    if first["type"] == "missing":
        return f"{origin.at(key)}: the config needs this key"
    if key == "resume_from_checkpoint":
        return f"{origin.at(key)}: say `resume: auto` instead, and leave this at false"
    if key == "resume":
        return f"{origin.at(key)}: auto, or the path of a checkpoint, not {value!r}"
    if key == "dtype" and value in ("fp16", "float16"):
        return (
            f"{origin.at(key)}: fp16 is not supported (its gradients underflow); use auto, bf16 "
            "or fp32"
        )
    reason = first["msg"][0].lower() + first["msg"][1:]
    return f"{origin.at(key)}: {reason}, not {value!r}"
