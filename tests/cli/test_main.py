"""The whole command line: its help is light, and nothing else in the package talks to users."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "flowspec_edge"
HEAVY = {"onnxruntime", "aiohttp", "numpy", "zeroconf", "tokenizers", "msgpack", "cryptography"}
COMMANDS = (
    *((), ("node",), ("generate",), ("serve",), ("demo",), ("devices",), ("doctor",), ("plan",), ("key",), ("bench",)),
    *(("trace",), ("cache",), ("cache", "list"), ("cache", "prune")),
)


def test_help_loads_nothing_heavy():
    code = f"""
import sys
from flowspec_edge.cli.main import main
for command in {COMMANDS!r}:
    try:
        main([*command, "--help"])
    except SystemExit as end:
        assert end.code == 0
    else:
        raise AssertionError("help has not ended the program")
print(*sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.count("usage: flowspec ") == len(COMMANDS)
    assert not HEAVY & {name.partition(".")[0] for name in out.splitlines()[-1].split()}


def others():
    """Every module that is not a command, with what it consists of."""
    for path in PACKAGE.rglob("*.py"):
        if PACKAGE / "cli" not in path.parents and path.name != "__main__.py":
            yield path, list(ast.walk(ast.parse(path.read_text())))


def imports_of(nodes):
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_only_commands_print_and_parse_arguments():
    for path, nodes in others():
        called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        assert "print" not in called, path
        assert "argparse" not in set(imports_of(nodes)), path


def test_only_commands_import_commands_and_displays():
    for path, nodes in others():
        assert not [name for name in imports_of(nodes) if f"{name}.".startswith("flowspec_edge.cli.")], path
