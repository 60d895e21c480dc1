"""The house as its imports draw it: rooms, arrows between them, circles, and what is long in it.

A room is a folder of the package, or a module that lies flat in the package's root; each folder of ``core/`` is a room
of its own. ``FLOORS`` is the order of the rooms: a room imports only from rooms that stand after it. Imports for types
and imports inside functions count like all others. ``tests/test_layering.py`` holds the order, ``docs/draw_house.py``
draws it.

::

    python -m docs.house            # rooms, arrows and circles, functions over 40 lines and modules over 300
    python -m docs.house --write    # the same into docs/design.md, where the reasons stand
"""

from __future__ import annotations

import argparse
import ast
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGE = "flowspec_edge"
ANNEX = "exporter"
"""Stands beside the house: it may import from it, and nothing in the house imports it."""
FLOORS: tuple[tuple[str, ...], ...] = (
    ("__main__", "__init__"),
    ("cli",),
    ("bench",),
    ("web", "client"),
    ("origin",),
    ("node",),
    ("weights", "net", "engine"),
    ("core.planning",),
    ("core.speculation", "core.cluster", "core.device", "core.weights"),
    ("core",),
    ("bundle", "manifest", "files", "config"),
    ("tasks", "errors", "version", "allocator"),
)
ORDER: tuple[str, ...] = tuple(room for floor in FLOORS for room in floor)
DESIGN = ROOT / "docs" / "design.md"
LIST_HEAD, MISSING = "| what is long | lines | why it stays |", "?"
MAX_FUNCTION_LINES, MAX_MODULE_LINES = 40, 300
"""Beyond these a function and a module need a reason (docs/design.md, "The house")."""


class Import(NamedTuple):
    """A module imports another, or ``name`` from it. ``line`` is where that stands."""

    importer: str
    imported: str
    name: str
    line: int


class Long(NamedTuple):
    """A function or a module, and how many lines it has. ``name`` is empty where it is the module."""

    path: str
    name: str
    num_lines: int


@dataclass(frozen=True)
class House:
    """The sources of one checkout: modules by dotted name, ``flowspec_edge.core.wire`` for example."""

    modules: dict[str, Path]

    @classmethod
    def read(cls, root: Path = ROOT) -> House:
        """The package and its annex in the checkout at ``root``."""
        modules = {}
        for package in (PACKAGE, ANNEX):
            for path in sorted((root / package).rglob("*.py")):
                parts = path.relative_to(root).with_suffix("").parts
                modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
        return cls(modules)

    @cached_property
    def trees(self) -> dict[str, ast.Module]:
        """The syntax tree of each module."""
        return {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in self.modules.items()}

    @cached_property
    def imports(self) -> list[Import]:
        """Every import of a module of the house by another, wherever it stands in the file."""
        return [found for module in self.modules for found in self._imports_of(module)]

    def _imports_of(self, module: str) -> Iterator[Import]:
        for node in ast.walk(self.trees[module]):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name in self.modules:
                        yield Import(module, alias.name, "", node.lineno)
            elif isinstance(node, ast.ImportFrom) and node.module in self.modules:
                for alias in node.names:
                    submodule = f"{node.module}.{alias.name}"
                    if submodule in self.modules:
                        yield Import(module, submodule, "", node.lineno)
                    else:
                        yield Import(module, node.module, alias.name, node.lineno)

    def room_of(self, module: str) -> str:
        """The room in which a module stands."""
        parts = module.split(".")
        if parts[0] == ANNEX:
            return ANNEX
        if len(parts) == 1:
            return "__init__"
        is_deep = parts[1] == "core" and len(parts) > 2 and self._is_folder(".".join(parts[:3]))
        return ".".join(parts[1:3]) if is_deep else parts[1]

    def _is_folder(self, module: str) -> bool:
        return self.modules[module].name == "__init__.py"

    @cached_property
    def rooms(self) -> dict[str, list[str]]:
        """Modules by room."""
        rooms: dict[str, list[str]] = {}
        for module in self.modules:
            rooms.setdefault(self.room_of(module), []).append(module)
        return rooms

    @cached_property
    def arrows(self) -> set[tuple[str, str]]:
        """Which room imports from which other one."""
        pairs = ((self.room_of(found.importer), self.room_of(found.imported)) for found in self.imports)
        return {(start, end) for start, end in pairs if start != end}

    @cached_property
    def circles(self) -> list[list[str]]:
        """Files that import each other, directly or by way of others: each circle in alphabetical order."""
        return circles_of({(found.importer, found.imported) for found in self.imports})

    def role_of(self, room: str) -> str:
        """The first sentence of what a room says of itself."""
        module = PACKAGE if room == "__init__" else room if room == ANNEX else f"{PACKAGE}.{room}"
        docstring = ast.get_docstring(self.trees[module]) or ""
        return docstring.partition("\n\n")[0].partition(". ")[0].replace("\n", " ").replace("``", "").rstrip(".")

    def long_things(self) -> list[Long]:
        """Modules over MAX_MODULE_LINES, then functions over MAX_FUNCTION_LINES, in the package and its annex."""
        modules, functions = [], []
        for module, path in self.modules.items():
            where = path.as_posix().rpartition(f"/{module.partition('.')[0]}/")
            shown = f"{module.partition('.')[0]}/{where[2]}"
            num_lines = len(path.read_text(encoding="utf-8").splitlines())
            if num_lines > MAX_MODULE_LINES:
                modules.append(Long(shown, "", num_lines))
            for name, node in _functions(self.trees[module]):
                num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if num_lines > MAX_FUNCTION_LINES:
                    functions.append(Long(shown, name, num_lines))
        return modules + functions


def circles_of(arrows: set[tuple[str, str]]) -> list[list[str]]:
    """The groups of two and more that all reach each other."""
    below = _reachable(arrows)
    groups = {frozenset(other for other in reached if start in below[other]) for start, reached in below.items()}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def direct_arrows(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The arrows that no way over other arrows leads along: the least that tell the whole order.

    There must be no circle.
    """
    below = _reachable(arrows)
    return {
        (start, end)
        for start, end in arrows
        if not any(end in below.get(via, ()) for first, via in arrows if first == start and via != end)
    }


def _reachable(arrows: set[tuple[str, str]]) -> dict[str, set[str]]:
    """Whatever can be reached from where an arrow starts."""
    ahead: dict[str, set[str]] = {}
    for start, end in arrows:
        ahead.setdefault(start, set()).add(end)
    reached: dict[str, set[str]] = {}
    for start in ahead:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for end in ahead.get(waiting.pop(), ()):
                if end not in seen:
                    seen.add(end)
                    waiting.append(end)
        reached[start] = seen
    return {name: reached.get(name, set()) for name in {*ahead, *(end for _, end in arrows)}}


def _functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Functions and methods with the names of their classes. A function inside a function counts as part of it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}{child.name}", child


def write_counts(house: House, text: str) -> str:
    """The text of docs/design.md with its figures of today, and with the list of what is long. A reason stays with its
    name; where there is none yet, MISSING stands for it.
    """
    things = house.long_things()
    counted = [len(house.rooms), len(house.arrows), len(house.circles)]
    counted += [sum(not thing.name for thing in things), sum(bool(thing.name) for thing in things)]
    text = re.sub(r"^\| now \|.*$", f"| now | {' | '.join(map(str, counted))} |", text, flags=re.MULTILINE)
    reasons = reasons_in(text)
    rows = [f"| {_shown(thing)} | {thing.num_lines} | {reasons.get(_shown(thing), MISSING)} |" for thing in things]
    head, _, rest = text.partition(f"{LIST_HEAD}\n")
    below = itertools.dropwhile(lambda line: line.startswith("|"), rest.splitlines(keepends=True))
    return "".join([head, f"{LIST_HEAD}\n|---|---|---|\n", *(f"{row}\n" for row in rows), *below])


def reasons_in(text: str) -> dict[str, str]:
    """Of docs/design.md: why what is long stays so, by the name that the list gives it."""
    _, _, rest = text.partition(f"{LIST_HEAD}\n")
    rows = itertools.takewhile(lambda line: line.startswith("|"), rest.splitlines())
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {what: reason for what, _, reason in cells if reason != MISSING}


def _shown(thing: Long) -> str:
    return f"`{thing.path}`" + (f", `{thing.name}`" if thing.name else "")


def without_reason(house: House, text: str) -> list[str]:
    """What is long, and not in the list with a reason."""
    reasons = reasons_in(text)
    return [shown for thing in house.long_things() if (shown := _shown(thing)) not in reasons]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what was counted, or write it down."""
    parser = argparse.ArgumentParser(prog="python -m docs.house", description="What the imports say of the house.")
    parser.add_argument("--write", action="store_true", help="put figures and list into docs/design.md")
    parser.add_argument("--root", type=Path, default=ROOT, help="another checkout to read (default: this one)")
    options = parser.parse_args(arguments)
    house = House.read(options.root)
    if options.write:
        DESIGN.write_text(write_counts(house, DESIGN.read_text(encoding="utf-8")), encoding="utf-8")
        return
    print(f"{len(house.rooms)} rooms, {len(house.arrows)} arrows, {len(house.circles)} circles of files")
    for circle in house.circles:
        print("circle:", " ".join(circle))
    for thing in house.long_things():
        print(f"{thing.num_lines:4} lines: {thing.path} {thing.name}")


if __name__ == "__main__":
    main()
