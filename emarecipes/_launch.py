"""Lets the stock `tune` command find this project's recipes and configs.

Installed beside site-packages' other modules as `_emarecipes_launch`, with a one-line .pth that
imports it when Python starts. Start-up only registers a finder (no other import); the work happens
if and when torchtune's command line imports its recipe registry, or anything imports torchao.

Why not a recipe path alone: `tune run recipes/ema_lora.py` makes `recipes.ema_lora` of it, and
torchtune's own top-level package `recipes` is found first. A recipe that the registry knows is run
by its file path instead. Why not patch torchtune's files: reinstalling it would undo that.
"""

import os
import sys

_REGISTRY = "torchtune._recipe_registry"


class _RegistryFinder:
    """Adds our recipes to torchtune's registry when that module is imported."""

    @staticmethod
    def find_spec(name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name == "torchao":
            _silence_torchao()
        if name != _REGISTRY:
            return None
        import importlib.util

        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not _RegistryFinder]
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        load_stock = spec.loader.exec_module

        def load(module):  # type: ignore[no-untyped-def]
            load_stock(module)
            stock_recipes = module.get_all_recipes
            module.get_all_recipes = lambda: [*stock_recipes(), *_our_recipes(module)]
            # torchrun gives its workers 1 where there is none; see `emarecipes.machine`.
            os.environ["EMARECIPES_OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "")
            sys.excepthook = _end

        spec.loader.exec_module = load  # type: ignore[method-assign]
        return spec


def _silence_torchao():  # type: ignore[no-untyped-def]
    """Drop the one warning that torchao gives at every import beside a later torch.

    The last torchao that torchtune works with has no compiled kernels for it. Nothing here needs
    them, and a user can do nothing about it. Its other messages stay.
    """
    import logging

    def keep(record):  # type: ignore[no-untyped-def]
        return not str(record.msg).startswith("Skipping import of cpp extensions")

    logging.getLogger("torchao").addFilter(keep)


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


sys.meta_path.insert(0, _RegistryFinder)
