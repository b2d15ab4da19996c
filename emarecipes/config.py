"""Reading a run's config: YAML, command-line overrides, and where each key was written.

Keys and overrides are torchtune's. Two things are added: a whole entry can be removed
(`~defenses.kl`), and a value may contain `=`.
"""

import argparse
import copy
import difflib
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from emarecipes._secrets import check_no_secrets, texts
from emarecipes.errors import UserError, first_line
from emarecipes.overrides import read_value
from emarecipes.yaml_nodes import yaml_error

# No config comes near these. YAML's aliases can make a few lines mean billions of values.
_MAX_BYTES, _MAX_VALUES, _MAX_DEPTH = 2**20, 10_000, 50

# Keys, at any depth, that name a file or folder to read. Relative ones are looked up in the working
# folder first, then where emarecipes itself lies, so that shipped configs run from anywhere.
INPUT_PATH_KEYS = frozenset(
    {
        "checkpoint_dir",
        "path",
        "merges_file",
        "data_files",
        "vectors",
        "base_dir",
        "aligned_dir",
        "init_adapter",
    }
)

_LORA_MODEL = "emarecipes.models.lora_model"

_VARIABLE = re.compile(r"\$\{\s*([A-Za-z_]\w*)")


@dataclass(frozen=True)
class Origin:
    """Where a config's values were written, for error messages."""

    path: Path
    lines: dict[str, int] = field(default_factory=dict)
    overridden: frozenset[str] = frozenset()
    variables: frozenset[str] = frozenset()

    def at(self, key: str) -> str:
        """`file:line: key` (a missing key gets its parent's line), or `command line: key`."""
        key = str(key)  # YAML has keys that are no text.
        if any(key == k or key.startswith(f"{k}.") for k in self.overridden):
            return f"command line: {key}"
        parent = key
        while parent and parent not in self.lines:
            parent = parent.rpartition(".")[0]
        line = f":{self.lines[parent]}" if parent else ""
        return f"{self.path}{line}: {key}"


def load_config(argv: Sequence[str]) -> tuple[DictConfig, Origin]:
    """Read `--config FILE [key=value | ~key]...` into a resolved config.

    Returns:
        The config with overrides merged, interpolations resolved and input paths found, and the
        origin of its keys.

    Raises:
        UserError: No such file, broken YAML, an override of a wrong form or of a key that is not
            there to be removed, an interpolation that leads nowhere.
    """
    parser = argparse.ArgumentParser(prog="tune run recipes/...", allow_abbrev=False)
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", help="key=value, or ~key to remove an entry")
    arguments, extra = parser.parse_known_args(argv)
    overrides = [*arguments.overrides, *extra]
    check_no_secrets(overrides, lambda _: "command line")
    path = Path(arguments.config)
    if path.is_relative_to(Path.cwd()):  # As torchtune gives it, absolute; shorter in messages.
        path = path.relative_to(Path.cwd())

    text, root, cfg = _read_yaml(path)
    for override in overrides:
        try:
            _apply_override(cfg, override)
        except UserError:
            raise
        except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError) as error:
            raise UserError(f"command line: {override}: {first_line(error)}") from None
    origin = Origin(
        path=path,
        lines=dict(_key_lines(root, "")),
        overridden=frozenset(o.lstrip("~").split("=", 1)[0] for o in overrides),
        variables=frozenset(_VARIABLE.findall(text + " ".join(overrides))),
    )
    try:
        check_no_secrets(OmegaConf.to_container(cfg, resolve=False), origin.at)
        OmegaConf.resolve(cfg)
        missing = OmegaConf.missing_keys(cfg)
        if missing:
            raise UserError(f"{origin.at(min(missing))}: ??? must be given a value")
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or ""
        raise UserError(f"{origin.at(key)}: cannot be resolved: {first_line(error)}") from None
    plain = OmegaConf.to_container(cfg)
    check_no_secrets(plain, origin.at)
    for key, value in texts(plain):
        if "\0" in value:
            raise UserError(f"{origin.at(key)}: must not contain the character NUL")
    _find_inputs(cfg, origin)
    _fill_checkpointer(cfg, origin)
    return cfg, origin


def suggestion(word: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def home() -> Path:
    """The folder with `configs/` and `data/`: the clone, or the installed package's own copy."""
    package = Path(__file__).resolve().parent
    clone = package.parent
    return clone if (clone / "recipes" / "ema_lora.py").is_file() else package / "_shipped"


def _fill_checkpointer(cfg: DictConfig, origin: Origin) -> None:
    """With `lora_model`, what reads the weights follows from the model's folder.

    Raises:
        UserError: The config names another checkpointer, or no folder.
    """
    model = cfg.get("model")
    if not isinstance(model, DictConfig) or model.get("_component_") != _LORA_MODEL:
        return
    folder = model.get("path")
    if not isinstance(folder, str) or not folder:
        raise UserError(f"{origin.at('model')}: lora_model needs the key path, a model's folder")
    filled = {
        "_component_": "emarecipes.models.families.checkpoint.FolderCheckpointer",
        "checkpoint_dir": folder,
        "model_type": "CONFIG_JSON",
    }
    given = cfg.get("checkpointer")
    # A written config has it.
    if given is not None and {k: v for k, v in given.items() if k != "output_dir"} != filled:
        raise UserError(
            f"{origin.at('checkpointer')}: leave it out: lora_model's weights are those of "
            "model.path"
        )
    cfg.checkpointer = filled


@lru_cache(maxsize=16)
def _parsed(text: str, where: str) -> tuple[yaml.Node | None, Any]:
    """A text's nodes and values, kept: a comparison reads its few configs once for each run.

    The values are copied before they are changed.
    """
    root = _nodes(text, where)
    try:
        # OmegaConf's own loader reads 3e-4 as a number, which plain YAML does not.
        return root, OmegaConf.load(io.StringIO(text))
    except yaml.YAMLError as error:
        raise yaml_error(error, where) from None
    except (OmegaConfBaseException, OSError, ValueError, TypeError) as error:
        raise UserError(f"{where}: not a config: {first_line(error)}") from None


def _read_yaml(path: Path) -> tuple[str, yaml.Node, DictConfig]:
    """A config's text, its nodes with their lines, and its values."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: cannot read the config: not a file")
        if path.stat().st_size > _MAX_BYTES:
            raise UserError(f"{path}: {path.stat().st_size} bytes are no config")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot read the config: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the config is not UTF-8 text: {error.reason}") from None
    except ValueError as error:
        raise UserError(f"{path}: cannot read the config: {error}") from None
    root, cfg = _parsed(text, str(path))
    if not isinstance(cfg, DictConfig) or not cfg or not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}: a config is a mapping of keys to values, this file has none")
    return text, root, copy.deepcopy(cfg)


def _nodes(text: str, where: str) -> yaml.Node | None:
    """The YAML nodes of a text that is fit for OmegaConf."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _check_size(root, {}, 0)
    except yaml.YAMLError as error:
        raise yaml_error(error, where) from None
    except RecursionError:
        raise UserError(f"{where}: not valid YAML: nested too deeply") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return root


def _check_size(node: yaml.Node | None, known: dict[int, int], depth: int) -> int:
    """The number of values below a node, each alias written out."""
    if depth > _MAX_DEPTH:
        raise UserError(f"nested deeper than {_MAX_DEPTH} levels, or in itself")
    if node is not None and id(node) not in known:
        size = 1
        if isinstance(node, yaml.CollectionNode):
            for item in node.value:
                for child in item if isinstance(item, tuple) else (item,):
                    size += _check_size(child, known, depth + 1)
        if size > _MAX_VALUES:
            raise UserError(f"more than {_MAX_VALUES} values")
        known[id(node)] = size
    return known.get(id(node), 0)


def _key_lines(node: yaml.Node | None, prefix: str) -> Iterable[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            key = f"{prefix}{key_node.value}"
            yield key, key_node.start_mark.line + 1
            yield from _key_lines(value_node, f"{key}.")
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield f"{prefix}{index}", item.start_mark.line + 1
            yield from _key_lines(item, f"{prefix}{index}.")


def _apply_override(cfg: DictConfig, override: str) -> None:
    if override.lstrip("~").startswith("["):
        raise UserError(f"command line: {override}: a key begins with a name, not with an index")
    if override.startswith("~"):
        parent_key, _, name = override[1:].partition("=")[0].rpartition(".")
        parent = OmegaConf.select(cfg, parent_key) if parent_key else cfg
        if not isinstance(parent, DictConfig) or name not in parent:
            known = parent if isinstance(parent, DictConfig) else ()
            hint = suggestion(name, map(str, known))
            raise UserError(f"command line: {override}: no such key to remove{hint}")
        del parent[name]
        return
    key, equals, value = override.partition("=")
    if not equals or not key or key.startswith("-"):
        raise UserError(f"command line: {override}: an override is written key=value, or ~key")
    # As torchtune has it: `optimizer=torch.optim.SGD` replaces the component.
    node = OmegaConf.select(cfg, key, throw_on_missing=False)
    if value not in ("null", "None") and isinstance(node, DictConfig) and "_component_" in node:
        key += "._component_"
    _nodes(value, f"command line: {override}")
    OmegaConf.update(cfg, key, read_value(key, value), merge=False)


def _find_inputs(node: Any, origin: Origin, prefix: str = "") -> None:
    if isinstance(node, DictConfig):
        for key, value in node.items():
            where = f"{prefix}{key!s}"
            if key in INPUT_PATH_KEYS and isinstance(value, str):
                node[key] = _found(value, origin.at(where))
            elif key in INPUT_PATH_KEYS and OmegaConf.is_list(value):
                node[key] = [
                    _found(one, origin.at(where)) if isinstance(one, str) else one for one in value
                ]
            else:
                _find_inputs(value, origin, f"{where}.")
    elif OmegaConf.is_list(node):
        for index, value in enumerate(node):
            _find_inputs(value, origin, f"{prefix}{index}.")


def _found(path: str, where: str) -> str:
    try:
        return find_input(path)
    except OSError as error:  # Such as a name that is too long.
        raise UserError(f"{where}: {error.strerror}: {path}") from None


def find_input(path: str) -> str:
    """The path itself, or, where only that exists, the same path below `home()`."""
    elsewhere = home() / path
    return str(elsewhere) if not Path(path).exists() and elsewhere.exists() else path
