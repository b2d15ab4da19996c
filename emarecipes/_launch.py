"""Lets the stock `tune` command find this project's recipes and configs, and torchtune import.

Installed beside site-packages' other modules as `_emarecipes_launch`, with a one-line .pth that
imports it when Python starts; `import emarecipes` does it where there is no .pth. Start-up only
registers finders (no other import); the work happens if and when torchtune's command line imports
its recipe registry or its downloads, torchtune's import asks torchao for what it no longer has, or
anything imports torchao.

Why not a recipe path alone: `tune run recipes/ema_lora.py` makes `recipes.ema_lora` of it, and
torchtune's own top-level package `recipes` is found first. A recipe that the registry knows is run
by its file path instead. Why not patch torchtune's files: reinstalling it would undo that.
"""

import os
import sys

_NF4 = "torchao.dtypes.nf4tensor"


class _Finder:
    """Asked first. Changes what `_AT_IMPORT` names when that is imported."""

    @staticmethod
    def find_spec(name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name == "torchao":
            _silence_torchao()
        load = _AT_IMPORT.pop(name, None)
        if load is None:
            return None
        import importlib.util

        spec = importlib.util.find_spec(name)  # By the other finders: this one does not answer now.
        _AT_IMPORT[name] = load
        if spec is not None and spec.loader is not None:
            load_stock = spec.loader.exec_module
            spec.loader.exec_module = lambda module: load(module, load_stock)  # type: ignore[method-assign]
        return spec


def _add_our_recipes(registry, load_stock):  # type: ignore[no-untyped-def]
    load_stock(registry)
    stock_recipes = registry.get_all_recipes
    registry.get_all_recipes = lambda: [*stock_recipes(), *_our_recipes(registry)]
    # torchrun gives its workers 1 where there is none; see `emarecipes.machine`.
    os.environ["EMARECIPES_OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "")
    sys.excepthook = _end


def _lend_gone_names(quantizers, load_stock):  # type: ignore[no-untyped-def]
    """Load torchtune's quantizers beside a torchao that lacks what some of them call.

    torchtune imports the names with all else; only what quantizes a finished model calls them, and
    nothing here does. torchao has them for the time of that import alone: whoever else asks torchao
    for them gets the true answer.
    """
    import torchao.dtypes
    import torchao.quantization

    called = (
        (torchao.dtypes, "TensorCoreTiledLayout"),  # gone since torchao 0.18
        (torchao.quantization, "int4_weight_only"),  # since 0.16
        (torchao.quantization, "int8_dynamic_activation_int4_weight"),  # since 0.16
    )
    gone = [(module, name) for module, name in called if not hasattr(module, name)]
    for module, name in gone:
        setattr(module, name, _refusal(name))
    try:
        load_stock(quantizers)
    finally:
        for module, name in gone:
            delattr(module, name)


def _refusal(name):  # type: ignore[no-untyped-def]
    """What a quantizer of torchtune's calls where torchao no longer has it: it says so."""

    def refuse(*args, **kwargs):  # type: ignore[no-untyped-def]
        import torchao

        raise NotImplementedError(
            f"torchtune's quantizer calls torchao's {name}, which torchao {torchao.__version__} no "
            "longer has: quantize with torchao 0.15"
        )

    return refuse


def _load_without_kaggle(download, load_stock):  # type: ignore[no-untyped-def]
    """Load `tune download`'s code in a `tune run` without kagglehub, which is 0.4 s to import.

    A run makes that command's parser and calls nothing of it. Whoever imports kagglehub later gets
    it: the stand-ins are there for this import alone.
    """
    from types import ModuleType

    called = {
        "kagglehub": "model_download",
        "kagglehub.auth": "set_kaggle_credentials",
        "kagglehub.exceptions": "KaggleApiHTTPError",
        "kagglehub.handle": "parse_model_handle",
    }
    if sys.argv[1:2] != ["run"] or "kagglehub" in sys.modules:
        return load_stock(download)
    for module, name in called.items():
        sys.modules[module] = ModuleType(module)
        setattr(sys.modules[module], name, None)
    try:
        load_stock(download)
    finally:
        for module in called:
            del sys.modules[module]


def _load_without_collecting(module, load_stock):  # type: ignore[no-untyped-def]
    """Import torchtune (with it torch), or what trains, without looking for garbage: there is none.

    It took a sixth of the import. In a command of ours what is there then stays out of collections,
    as all of it stays until the end: torchtune collects whenever it loads weights, half a second.
    """
    import gc
    import re

    collects = gc.isenabled()
    gc.disable()
    try:
        load_stock(module)
    finally:
        if re.search(r"(^|/)(tune|ema_\w+\.py)$", "".join(sys.argv[:1])):
            gc.freeze()
        if collects:
            gc.enable()


_AT_IMPORT = {
    "emarecipes.training": _load_without_collecting,
    "torchtune": _load_without_collecting,
    "torchtune._cli.download": _load_without_kaggle,
    "torchtune._recipe_registry": _add_our_recipes,
    "torchtune.training.quantization": _lend_gone_names,
}


class _LastFinder:
    """Asked last, so for what would fail: the 4-bit tensors where torchtune looks for them.

    torchao 0.18 has moved the module; what is in it is the same. Where there is no torchtune in the
    process, the import fails as ever.
    """

    @staticmethod
    def find_spec(name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name != _NF4 or "torchtune" not in sys.modules:
            return None
        from importlib.machinery import ModuleSpec

        return ModuleSpec(name, _LastFinder)  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec):  # type: ignore[no-untyped-def]
        return None

    @staticmethod
    def exec_module(module):  # type: ignore[no-untyped-def]
        from torchao.quantization.quantize_.workflows.nf4 import nf4_tensor

        sys.modules[_NF4] = nf4_tensor  # An import gives what stands here in the end.


def _silence_torchao():  # type: ignore[no-untyped-def]
    """Drop what is said at every import of torchao, and a user can do nothing about.

    Beside a later torch than its own, torchao 0.13 to 0.17 say that their compiled kernels are left
    out, which nothing here needs; and torch 2.14 that it will no longer take the way in which
    torchao 0.18 registers two enumerations. Other messages stay.
    """
    import logging

    dropped = (
        "Skipping import of cpp extensions",
        "%s is an Enum subclass and is now natively supported",
    )

    def keep(record):  # type: ignore[no-untyped-def]
        return not str(record.msg).startswith(dropped)

    for logger in ("torchao", "torch.utils._pytree"):
        logging.getLogger(logger).addFilter(keep)


def _end(kind, error, trace):  # type: ignore[no-untyped-def]
    """`sys.excepthook` of a `tune` command."""
    from emarecipes.command import end_launcher

    end_launcher(kind, error, trace)


def _home():  # type: ignore[no-untyped-def]
    """The folder with `recipes/` and `configs/`: the clone, or the installed package's copy."""
    import importlib.util
    from pathlib import Path

    spec = importlib.util.find_spec("emarecipes")
    if spec is None or spec.origin is None:
        return None
    package = Path(spec.origin).parent
    clone = package.parent
    return clone if (clone / "recipes" / "ema_lora.py").is_file() else package / "_shipped"


def _our_recipes(registry):  # type: ignore[no-untyped-def]
    """Registry entries named as a user types them: `recipes/ema_lora.py`, `configs/NAME.yaml`.

    A file of that name below the working folder wins over the installed one, and a recipe given by
    any other path on the command line (absolute, `../clone/recipes/...`) is entered as typed.
    """
    import re
    from pathlib import Path

    home = _home()
    if home is None:
        return []

    def resolve(name):  # type: ignore[no-untyped-def]
        return str((Path(name) if Path(name).is_file() else home / name).resolve())

    recipe_names = sorted(path.name for path in (home / "recipes").glob("ema_*.py"))
    configs: dict[str, list[object]] = {name: [] for name in recipe_names}
    for config in sorted((home / "configs").glob("*.yaml")):
        # Each config's header shows the command that runs it.
        pattern = rf"recipes/(ema_\w+\.py) --config configs/{re.escape(config.name)}"
        command = re.search(pattern, config.read_text(encoding="utf-8"))
        if command and command[1] in configs:
            name = f"configs/{config.name}"
            configs[command[1]].append(registry.Config(name, resolve(name)))

    paths = {f"recipes/{name}": resolve(f"recipes/{name}") for name in recipe_names}
    for typed in sys.argv:
        if Path(typed).name in configs and Path(typed).is_file():
            paths[typed] = str(Path(typed).resolve())
    return [
        registry.Recipe(name, path, configs[Path(name).name], supports_distributed=True)
        for name, path in paths.items()
    ]


sys.meta_path.insert(0, _Finder)
sys.meta_path.append(_LastFinder)
