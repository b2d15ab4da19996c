"""The house in numbers: files and lines of each room, the arrows between rooms, circles.

    python benchmarks/arrows.py [TREE]

A room is a folder of `emarecipes/` with modules in it; `.` is what stands beside the folders. An
arrow is an import of one room by a module of another, wherever in the module it stands and whether
or not it is for types alone. `tests/test_house.py` fails at a circle, and at an arrow upwards.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

PACKAGE = "emarecipes"
# From the ground up. Rooms of one line do not import each other.
ROOMS: Sequence[Sequence[str]] = (
    (".",),
    ("models.chat", "models.families"),
    ("models",),
    ("models.adapters", "models.prepare", "models.sampling"),
    ("checked",),
    ("defenses",),
    ("datasets",),
    ("probes", "judges"),
    ("training", "generation", "selection", "persona", "evaluation"),
    ("comparison",),
    ("plan", "export", "served"),
)
# Reasons for an arrow that leads upwards, by (importing module, imported room).
UPWARD: Mapping[tuple[str, str], str] = {}


class House:
    """The modules of a tree, and what each imports of the package.

    Args:
        tree: The repository's root.
    """

    def __init__(self, tree: Path) -> None:
        self.files: dict[str, Path] = {}
        for path in sorted((tree / PACKAGE).rglob("*.py")):
            parts = path.relative_to(tree).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            self.files[name] = path
        self.imports = {m: set(self._imports(path)) for m, path in self.files.items()}

    def room(self, module: str) -> str:
        """The room that a module is in; a folder's own `__init__` is in the folder."""
        path = self.files[module]
        folder = module if path.name == "__init__.py" else module.rpartition(".")[0]
        return folder.removeprefix(PACKAGE).removeprefix(".") or "."

    def _imports(self, path: Path) -> Iterator[tuple[str, bool]]:
        """Modules of the package that a file imports, and whether for types alone."""
        tree = ast.parse(path.read_text(encoding="utf-8"))
        typing = {
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                whole = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if name in self.files else node.module for name in whole]
            yield from ((name, node in typing) for name in names if name in self.files)

    def arrows(self) -> Counter[tuple[str, str]]:
        """How many modules of one room import one of another, by (from, to)."""
        found = (
            (self.room(m), self.room(to)) for m, all_ in self.imports.items() for to, _ in all_
        )
        return Counter(pair for pair in found if pair[0] != pair[1])

    def circles_of_rooms(self) -> list[list[str]]:
        """Rooms that reach each other."""
        graph: dict[str, set[str]] = defaultdict(set)
        for start, end in self.arrows():
            graph[start].add(end)
        return circles(graph)

    def circles_of_modules(self, types: bool = False) -> list[list[str]]:
        """Modules that reach each other; with `types`, also by imports for types alone."""
        graph = {
            module: {to for to, typed in found if types or not typed}
            for module, found in self.imports.items()
        }
        return circles(graph)

    def upward(self) -> list[tuple[str, str]]:
        """(Module, room) of arrows to a room that is not below; rooms must all be in `ROOMS`."""
        level = {room: i for i, rooms in enumerate(ROOMS) for room in rooms}
        found = {
            (module, self.room(to))
            for module, ends in self.imports.items()
            for to, _ in ends
            if self.room(to) != self.room(module)
            and level[self.room(to)] >= level[self.room(module)]
        }
        return sorted(found)


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The nodes that reach each other, as sorted lists; a graph without circles has none."""
    reached = {node: _reach(graph, node) for node in graph}
    together = {
        tuple(sorted(other for other in seen if other in graph and node in reached[other]))
        for node, seen in reached.items()
        if node in seen
    }
    return sorted(map(list, together))


def _reach(graph: Mapping[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    open_ = [start]
    while open_:
        for node in graph.get(open_.pop(), set()):
            if node not in seen:
                seen.add(node)
                open_.append(node)
    return seen


def main(argv: Sequence[str]) -> int:
    tree = Path(argv[0]) if argv else Path(__file__).resolve().parents[1]
    house = House(tree)
    lines, files = Counter[str](), Counter[str]()
    for module, path in house.files.items():
        files[house.room(module)] += 1
        lines[house.room(module)] += len(path.read_text(encoding="utf-8").splitlines())
    arrows = house.arrows()
    order = [room for rooms in ROOMS for room in rooms]
    for room in sorted(files, key=lambda r: (order.index(r) if r in order else len(order), r)):
        ends = ", ".join(f"{to} {n}" for (start, to), n in sorted(arrows.items()) if start == room)
        print(f"{room:16} {files[room]:3} files {lines[room]:6} lines   {ends}")
    print(f"{len(arrows)} pairs of rooms, {sum(arrows.values())} imports between rooms")
    print("circles of rooms:", house.circles_of_rooms() or "none")
    print("circles of modules:", house.circles_of_modules() or "none")
    print("  with types:", house.circles_of_modules(types=True) or "none")
    if set(files) <= set(order):
        print("upward:", house.upward() or "none")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
