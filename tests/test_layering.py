"""Who may import whom, read from the sources: rooms have an order, the core stays pure, devices stay without torch."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeGuard

import pytest

from docs.draw_house import draw_house, shown_name
from docs.house import ANNEX, DESIGN, ORDER, ROOT, House, without_reason

HOUSE = House.read()
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "docs/boards.md",
    "docs/models.md",
    "docs/clients.md",
    "docs/design.md",
    "docs/performance.md",
    "docs/protocol.md",
    "docs/reliability.md",
    "docs/arm.md",
    "docs/demo-model.md",
    "docs/draft-heads.md",
]
OURS = {"flowspec_edge", "exporter", "tests", "docs", "examples", "benchmarks"}
OURS |= {path.name for path in (ROOT / "flowspec_edge").iterdir() if path.is_dir()}
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
DOCUMENTED = {"_exit", "_replace", "_asdict", "_fields", "_make"}
"""Names of the standard library that are public in spite of their underscore."""
OF_LIBRARIES = {
    "exporter.tokenizer: (...)._tokenizer",
    "flowspec_edge.bench.slow_core: asyncio.Handle._run",
    "flowspec_edge.net.link: websocket._writer",
}
"""Where a library has no public way to what is needed; the line itself says why."""
PROGRAMS = {"flowspec_edge.bench.replay"}
"""What is run by ``python -m`` beside the command line."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOT_ASKED_FOR = {"opentelemetry", "_typeshed", "firmware_configs"}
"""Used where a program has it; imported for types alone; ours."""
PURE = {
    "flowspec_edge.core",
    "flowspec_edge.errors",
    "flowspec_edge.config",
    "flowspec_edge.manifest",
    "numpy",
    "msgpack",
    "msgspec",
}


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{path}: relative import"
            yield node.module


def is_within(module: str, packages: Iterable[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", modules("flowspec_edge/core"), ids=lambda path: path.name)
def test_the_core_is_pure(path: Path) -> None:
    for module in imports_of(path):
        if module.split(".")[0] in sys.stdlib_module_names:
            assert module not in ("asyncio", "socket", "time", "threading", "random"), module
        else:
            assert is_within(module, PURE), module


FORBIDDEN = {
    "flowspec_edge": ["torch", "optimum", "transformers", "exporter"],
    "flowspec_edge/engine": ["flowspec_edge.net", "flowspec_edge.node.node", "aiohttp", "zeroconf"],
    "flowspec_edge/net": ["flowspec_edge.engine", "flowspec_edge.node.node", "onnxruntime"],
}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_keep_to_themselves(package: str) -> None:
    for path in modules(package):
        for module in imports_of(path):
            assert not is_within(module, FORBIDDEN[package]), f"{path} imports {module}"


def test_each_library_is_one_that_a_wheel_asks_for_and_some_have_one_home() -> None:
    homes = {"onnxruntime": "engine", "zeroconf": "net"}
    asked = set(re.findall(r"^[\w-]+", "\n".join(PROJECT["dependencies"]), re.MULTILINE))
    for path in modules("flowspec_edge"):
        for module in imports_of(path):
            library = module.split(".")[0]
            if library not in sys.stdlib_module_names | OURS | NOT_ASKED_FOR:
                assert library in asked, f"{path} imports {module}, which pyproject.toml does not ask for"
            home = homes.get(library)
            assert home is None or path.parent.name == home or path.parent.parent.name == home, (
                f"{path} imports {module}"
            )


def test_the_exporter_needs_only_what_graphs_and_tokenizers_are_driven_by_and_errors_of_the_runtime() -> None:
    for path in modules("exporter"):
        for module in imports_of(path):
            assert not module.startswith("flowspec_edge") or module in (
                "flowspec_edge.core.limits",
                "flowspec_edge.manifest",
                "flowspec_edge.engine.attention_inputs",
                "flowspec_edge.engine.padding",
                "flowspec_edge.engine.token_texts",
                "flowspec_edge.engine.tokenizer",
                "flowspec_edge.errors",
                "flowspec_edge.web.chat_template",
            )


def test_every_room_has_its_place_in_the_order() -> None:
    assert set(HOUSE.rooms) - {ANNEX} == set(ORDER)


def test_a_room_imports_only_from_rooms_below_it() -> None:
    upwards = {
        f"{found.importer} -> {found.imported}"
        for found in HOUSE.imports
        if (start := HOUSE.room_of(found.importer)) != ANNEX
        and ORDER.index(start) > ORDER.index(HOUSE.room_of(found.imported))
    }
    assert upwards == set()


def test_no_two_files_import_each_other_in_a_circle() -> None:
    assert {" ".join(file.rpartition(".")[2] for file in circle) for circle in HOUSE.circles} == set()


def test_a_name_is_imported_from_where_it_is_defined() -> None:
    handed_on = {
        f"{found.imported}.{found.name}"
        for found in HOUSE.imports
        if found.name and found.name not in defined_in(HOUSE.trees[found.imported])
    }
    assert handed_on == set()


def test_no_package_hands_on_what_its_files_define() -> None:
    for module, path in HOUSE.modules.items():
        if path.name != "__init__.py" or module == "flowspec_edge":
            continue
        names = [node for node in ast.walk(HOUSE.trees[module]) if isinstance(node, ast.Name)]
        used = {node.id for node in names if not is_stored(node)}
        assert "__all__" not in {node.id for node in names}, module
        for node in ast.walk(HOUSE.trees[module]):
            if isinstance(node, ast.ImportFrom) and node.module != "__future__":
                assert {alias.asname or alias.name for alias in node.names} <= used, f"{module}: line {node.lineno}"


def defined_in(tree: ast.Module) -> set[str]:
    """Names that a module binds by other means than an import."""
    return {
        bound
        for statement in tree.body
        for node in ([statement] if isinstance(statement, SCOPES) else ast.walk(statement))
        if (bound := node.name if isinstance(node, SCOPES) else node.id if is_stored(node) else None) is not None
    }


def is_stored(node: ast.AST) -> TypeGuard[ast.Name]:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def test_no_file_reaches_into_what_is_private_elsewhere() -> None:
    reached = {
        f"{module}: {reach}" for module in HOUSE.modules for reach in private_reaches(HOUSE.trees[module], frozenset())
    }
    assert reached == OF_LIBRARIES


def private_reaches(node: ast.AST, own: frozenset[str]) -> Iterator[str]:
    """Attributes and imported names with one leading underscore, but for those of a class that stands around them."""
    if isinstance(node, ast.ClassDef):
        own = own | private_names(node)
    if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
        yield ast.unparse(node) if isinstance(node.value, ast.Name | ast.Attribute) else f"(...).{node.attr}"
    if isinstance(node, ast.ImportFrom):
        yield from (f"from {node.module} import {alias.name}" for alias in node.names if is_private(alias.name))
    for child in ast.iter_child_nodes(node):
        yield from private_reaches(child, own)


def private_names(scope: ast.ClassDef) -> set[str]:
    """What a class calls its own: methods, fields, and attributes of its ``self`` or ``cls``."""
    names: set[str] = set()
    for node in ast.walk(scope):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
            names.add(node.attr)
        elif isinstance(node, SCOPES):
            names.add(node.name)
        elif is_stored(node):
            names.add(node.id)
    return names


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in DOCUMENTED


def test_what_is_long_has_a_reason() -> None:
    assert set(without_reason(HOUSE, DESIGN.read_text())) == set()


def test_the_picture_has_every_room() -> None:
    picture = draw_house(HOUSE)
    for room in ORDER:
        assert f">{shown_name(room)}</text>" in picture


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_a_document_names_are_there(document: str) -> None:
    for name in re.findall(r"`((?:[\w.-]+/)+[\w.-]*|[\w-]+\.py)`", (ROOT / document).read_text()):
        first, slash, _ = name.partition("/")
        if first in OURS or not slash:
            assert (ROOT / name).exists() or (ROOT / "flowspec_edge" / name).exists(), f"{document} names {name}"


def test_only_the_command_line_reads_arguments_and_prints() -> None:
    for module in modules_outside("cli", ANNEX):
        if module in PROGRAMS:
            continue
        for node in ast.walk(HOUSE.trees[module]):
            assert not (isinstance(node, ast.Name) and node.id == "print"), f"{module} prints in line {node.lineno}"
        assert "argparse" not in imports_of(HOUSE.modules[module]), module


def modules_outside(*rooms: str) -> list[str]:
    return [module for room, inside in HOUSE.rooms.items() if room not in rooms for module in inside]


def test_only_the_command_line_imports_what_shows() -> None:
    for found in HOUSE.imports:
        if found.imported.rpartition(".")[2].startswith("show_"):
            assert HOUSE.room_of(found.importer) == "cli", f"{found.importer} imports {found.imported}"


def test_a_running_node_never_loads_torch() -> None:
    names = [module for module in HOUSE.rooms["cli"] if module != "flowspec_edge.cli"]
    assert "flowspec_edge.cli.main" in names
    code = f"import sys, {', '.join(names)}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
