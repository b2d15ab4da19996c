"""Checks `_component_` entries before anything is built: import path, arguments, their types.

torchtune instantiates what a config names and reports whatever Python raises. A run that trains for
hours deserves to fail at once instead, and in one line.
"""

import inspect
import sys
import typing
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError
from torchtune.config import instantiate

from emarecipes.config import Origin, suggestion
from emarecipes.errors import RowError, UserError, reason

# What the recipe passes by itself, by top-level key: number of positional arguments, and names.
_GIVEN: dict[str, tuple[int, frozenset[str]]] = {
    "dataset": (1, frozenset({"tokenizer"})),
    "optimizer": (1, frozenset({"params"})),
    "lr_scheduler": (1, frozenset({"optimizer", "num_training_steps", "last_epoch"})),
    "checkpointer": (0, frozenset({"output_dir", "should_load_recipe_state"})),
}

# What releases that the ranges allow lack.
_CAME_WITH = {"torch.optim.Muon": f"torch 2.9, and this is torch {version('torch')}"}


def check_components(cfg: DictConfig, origin: Origin) -> None:
    """Check every entry with a `_component_`, at any depth.

    Raises:
        UserError: An import path that leads nowhere, an argument that the component does not take
            or that it needs and lacks, a value of a wrong type.
    """
    see_working_folder()
    for key, node in _component_nodes(cfg, ""):
        target = locate(str(node["_component_"]), origin.at(f"{key}._component_"))
        positional, given = _GIVEN.get(key.split(".")[0], (0, frozenset()))
        arguments = {str(k): v for k, v in node.items() if k != "_component_"}
        parent: Any = OmegaConf.select(cfg, key.removesuffix(".safe"))
        if key.endswith(".safe") and "interleaved_dataset" in str(parent.get("_component_")):
            arguments.pop("ce_weight", None)  # The mixed set's own key, not the child's.
        _check_names(target, arguments, positional, given, key, origin)
        _check_types(target, arguments, key, origin)


def see_working_folder() -> None:
    """Let a user's own class in the working folder be named, as torchtune does."""
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))


def build(cfg: DictConfig, key: str, origin: Origin, *args: Any, **kwargs: Any) -> Any:
    """Instantiate `cfg[key]`, turning what it raises into a UserError with its place."""
    try:
        return instantiate(OmegaConf.select(cfg, key), *args, **kwargs)
    except RowError:
        raise
    except UserError as error:
        raise UserError(f"{origin.at(key)}: {error}") from None
    except (Exception, SystemExit) as error:
        raise UserError(f"{origin.at(key)}: {reason(error)}") from error


def locate(path: str, where: str) -> Callable[..., Any]:
    """The object at a dotted import path.

    Raises:
        UserError: Nothing is there; names the longest part that exists and the closest name in it.
    """
    parts = path.split(".")
    if not all(parts):
        raise UserError(f"{where}: {path!r} is not a dotted import path")
    for split in range(len(parts), 0, -1):
        module_name = ".".join(parts[:split])
        try:
            found: Any = import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name and not module_name.startswith(error.name):
                raise UserError(f"{where}: {path} needs the module {error.name}") from None
            continue
        except (Exception, SystemExit) as error:
            raise UserError(f"{where}: importing {path} fails: {reason(error)}") from error
        reached = module_name
        for name in parts[split:]:
            if not hasattr(found, name):
                since = _CAME_WITH.get(f"{reached}.{name}")
                hint = f": it came with {since}" if since else suggestion(name, dir(found))
                raise UserError(f"{where}: {path}: {reached} has no {name}{hint}")
            found = getattr(found, name)
            reached = f"{reached}.{name}"
        if not callable(found):
            raise UserError(f"{where}: {path} is not a class or function")
        target: Callable[..., Any] = found
        return target
    raise UserError(f"{where}: {path}: no module named {parts[0]}")


def _component_nodes(node: Any, prefix: str) -> Iterator[tuple[str, DictConfig]]:
    if isinstance(node, DictConfig):
        if prefix and "_component_" in node:
            yield prefix, node
        for key, value in node.items():
            yield from _component_nodes(value, f"{prefix}.{key!s}" if prefix else str(key))
    elif OmegaConf.is_list(node):
        for index, value in enumerate(node):
            yield from _component_nodes(value, f"{prefix}.{index}")


def _check_names(
    target: Callable[..., Any],
    arguments: dict[str, Any],
    positional: int,
    given: frozenset[str],
    key: str,
    origin: Origin,
) -> None:
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except (ValueError, TypeError):  # Written in C, without a signature.
        return
    name = getattr(target, "__name__", str(target))
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    free = [p.name for p in named[positional:] if p.name not in given]
    for argument in arguments:
        if argument not in free and argument not in given and not takes_any:
            takes = f"{name} takes {', '.join(free)}" if free else f"{name} takes no arguments"
            where = origin.at(f"{key}.{argument}")
            raise UserError(f"{where}: unknown key{suggestion(argument, free)}; {takes}")
    for parameter in named[positional:]:
        needed = parameter.default is parameter.empty and parameter.name not in given
        if needed and parameter.name not in arguments:
            raise UserError(f"{origin.at(key)}: {name} needs the key {parameter.name}")


def _check_types(
    target: Callable[..., Any], arguments: dict[str, Any], key: str, origin: Origin
) -> None:
    function = target.__init__ if inspect.isclass(target) else target
    try:
        parameters = inspect.signature(target).parameters.values()
        named = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
        hints = typing.get_type_hints(function, include_extras=True)
    except Exception:  # Annotations that cannot be evaluated say nothing about the value.
        return
    for argument, value in arguments.items():
        # `**kwargs: Dict[str, Any]` annotates each extra keyword; torchtune means all of them.
        if argument not in hints or argument not in named:
            continue
        is_entry = isinstance(value, DictConfig) and "_component_" in value
        if is_entry and not _is_plain(hints[argument]):
            continue  # What it builds is passed, not the entry.
        try:
            adapter = TypeAdapter(
                hints[argument], config=ConfigDict(arbitrary_types_allowed=True, strict=True)
            )
        except (PydanticUserError, PydanticSchemaGenerationError, TypeError):
            continue
        plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        try:
            adapter.validate_python(plain)
        except ValidationError as error:
            # YAML has no tuples: a list is one, as torchtune has it.
            with suppress(ValidationError):
                adapter.validate_python(_with_tuples(plain))
                continue
            said = error.errors()[0]["msg"]
            raise UserError(
                f"{origin.at(f'{key}.{argument}')}: {said[0].lower()}{said[1:]}, not {plain!r}"
            ) from None


def _with_tuples(value: Any) -> Any:
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _is_plain(hint: Any) -> bool:
    """Whether an argument takes numbers, texts and lists of them alone, which no entry builds."""
    if hint in (int, float, bool, str, type(None)):
        return True
    inner = [a for a in typing.get_args(hint) if a is not Ellipsis]
    return typing.get_origin(hint) is typing.Literal or (bool(inner) and all(map(_is_plain, inner)))
