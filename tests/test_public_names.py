"""What `import flowspec_edge` gives: each public name, known to a type checker, and nothing heavy before it is used."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flowspec_edge
from flowspec_edge import errors

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "flowspec_edge"


def modules_after(code: str) -> list[str]:
    """The modules that a new process has imported when it has run this code."""
    return subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"], check=True, capture_output=True, text=True
    ).stdout.split()


def test_the_public_names_are_these() -> None:
    assert set(flowspec_edge.__all__) == {
        *("Answer", "Client", "GenerateOptions", "Grammar", "Health", "Node", "Piece", "Ring", "Usage", "__version__"),
        *("AnswerTimeoutError", "ApiKeyError", "PlainHttpError"),
        *("AnswerLostError", "FlowspecError", "KeyTextError", "LinkLostError", "NodeUnavailableError"),
        *("OtherBundleError", "OtherKeyError", "RequestError", "ServerBusyError", "StageFailedError", "TextPart"),
        *("TextLogprob", "ToolCall"),
    }
    assert set(flowspec_edge.__all__) <= set(dir(flowspec_edge))


@pytest.mark.parametrize("name", flowspec_edge.__all__)
def test_each_name_is_that_of_its_module(name: str) -> None:
    value = getattr(flowspec_edge, name)
    if name != "__version__":
        assert (value.__name__, value.__module__.split(".")[0]) == (name, "flowspec_edge")
        assert getattr(importlib.import_module(value.__module__), name) is value


def test_a_name_that_there_is_not() -> None:
    with pytest.raises(AttributeError, match="module 'flowspec_edge' has no attribute 'Clint'"):
        flowspec_edge.Clint  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Clint'"):
        exec("from flowspec_edge import Clint")


def test_every_error_that_the_client_raises_is_a_public_name() -> None:
    raised = set(re.findall(r"\b(\w+Error)\b", (PACKAGE / "client.py").read_text()))
    raised |= set(re.findall(r"\b(\w+Error)\b", (PACKAGE / "net" / "api_session.py").read_text()))
    ours = {name for name in raised if hasattr(errors, name)}
    assert ours and ours <= set(flowspec_edge.__all__)


def test_the_version_is_that_of_the_distribution() -> None:
    assert f'version = "{flowspec_edge.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_the_package_alone_imports_nothing_heavy() -> None:
    found = modules_after("import flowspec_edge; dir(flowspec_edge); flowspec_edge.__version__")
    assert {name for name in found if name.startswith("flowspec_edge")} == {"flowspec_edge", "flowspec_edge.version"}
    assert not {"numpy", "aiohttp", "onnxruntime", "asyncio"} & set(found)


def test_options_and_pieces_come_without_the_client() -> None:
    assert not {"numpy", "aiohttp", "onnxruntime"} & set(
        modules_after("from flowspec_edge import GenerateOptions, Piece, RequestError")
    )


@pytest.mark.slow
def test_a_type_checker_knows_the_names(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="types are checked with mypy: pip install '.[dev]'")
    program = tmp_path / "program.py"
    lines = ["from flowspec_edge import " + ", ".join(flowspec_edge.__all__)]
    lines += [f"reveal_type({name})" for name in flowspec_edge.__all__]
    program.write_text("\n".join(lines) + "\n")
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--follow-imports=silent",
        "--cache-dir",
        str(ROOT / ".mypy_cache"),
    ]
    checked = subprocess.run([*command, str(program)], cwd=ROOT, capture_output=True, text=True, check=False)
    types = re.findall(r'Revealed type is "(.*)"', checked.stdout)
    assert len(types) == len(flowspec_edge.__all__), checked.stdout + checked.stderr
    assert not [name for name, found in zip(flowspec_edge.__all__, types, strict=True) if found == "Any"]
    assert "error:" not in checked.stdout


def test_nothing_within_the_package_imports_the_public_names() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "flowspec_edge":
                assert not {alias.name for alias in node.names} & set(flowspec_edge.__all__), path
            elif isinstance(node, ast.Import):
                assert "flowspec_edge" not in {alias.name for alias in node.names}, path
