"""Who may import whom, read from the sources: the core stays pure, devices stay without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PURE = {
    "flowspec_edge.core",
    "flowspec_edge.errors",
    "flowspec_edge.config",
    "flowspec_edge.manifest",
    "numpy",
    "msgpack",
}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


def is_within(module, packages):
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def modules(package):
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", modules("flowspec_edge/core"), ids=lambda path: path.name)
def test_the_core_is_pure(path):
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
def test_packages_keep_to_themselves(package):
    for path in modules(package):
        for module in imports_of(path):
            assert not is_within(module, FORBIDDEN[package]), f"{path} imports {module}"


def test_each_runtime_library_has_one_home():
    homes = {"onnxruntime": "engine", "zeroconf": "net"}
    for path in modules("flowspec_edge"):
        for module in imports_of(path):
            home = homes.get(module.split(".")[0])
            assert home is None or path.parent.name == home or path.parent.parent.name == home, (
                f"{path} imports {module}"
            )


def test_the_exporter_needs_only_what_graphs_are_driven_by_and_errors_of_the_runtime():
    for path in modules("exporter"):
        for module in imports_of(path):
            assert not module.startswith("flowspec_edge") or module in (
                "flowspec_edge.manifest",
                "flowspec_edge.engine.padding",
                "flowspec_edge.errors",
            )


def test_a_running_node_never_loads_torch():
    code = "import sys, flowspec_edge.cli, flowspec_edge.demo; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
