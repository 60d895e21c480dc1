"""Dockerfile and compose.yaml: what linters say of them, and that they are about this package."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from flowspec_edge.cli.main import build_parser
from flowspec_edge.core.cluster.api_url import API_PORT
from flowspec_edge.net.addresses import NODE_PORT

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
START = ROOT / "firmware_configs/container/start.sh"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml", reason="reading compose.yaml needs PyYAML, which comes with the exporter")
    found: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    return found


def test_the_linter_finds_nothing_in_the_dockerfile() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    if not linter.exists():
        pytest.skip("there is no hadolint: pip install '.[dev]'")
    found = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")


def test_compose_has_the_published_form(compose: dict[str, Any]) -> None:
    schemas = pytest.importorskip("check_jsonschema.builtin_schemas", reason="its schema comes with check-jsonschema")
    jsonschema.validate(compose, schemas.get_builtin_schema("vendor.compose-spec"))


def test_four_nodes_share_a_key_and_nothing_else(compose: dict[str, Any]) -> None:
    nodes = {name: service for name, service in compose["services"].items() if service["command"][0] == "node"}
    assert len(nodes) == 4
    for name, service in compose["services"].items():
        assert service["secrets"] == list(compose["secrets"])
        assert service["volumes"] == [f"{name}:/var/lib/flowspec"]
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and "ports" not in nodes.get(name, {})
    assert set(compose["volumes"]) == set(compose["services"])
    (published,) = compose["services"]["server"]["ports"]
    assert published == f"127.0.0.1:{API_PORT}:{API_PORT}", "for this machine alone"


def test_commands_of_containers_are_those_of_flowspec(compose: dict[str, Any]) -> None:
    commands = [service["command"] for service in compose["services"].values()]
    commands.append(json.loads(re.findall(r"^CMD (.*)$", DOCKERFILE, re.MULTILINE)[-1]))
    for command in commands:
        build_parser().parse_args(command)
        peer = command[command.index("--peer") + 1] if "--peer" in command else "node-1"
        assert peer in compose["services"]


def test_the_image_has_the_package_and_answers_where_it_listens(compose: dict[str, Any]) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for package in re.findall(r'"(\w+)\*?"', re.findall(r"^include = (.*)$", project, re.MULTILINE)[0]):
        assert f"COPY {package} {package}\n" in DOCKERFILE
        assert f"!{package}\n" in (ROOT / ".dockerignore").read_text(encoding="utf-8")
    assert f"('127.0.0.1', {NODE_PORT})" in DOCKERFILE
    assert f"EXPOSE {NODE_PORT} {API_PORT}" in DOCKERFILE
    assert f"//127.0.0.1:{API_PORT}/health" in compose["services"]["server"]["healthcheck"]["test"][-1]
    assert subprocess.run(["sh", "-n", START], check=False).returncode == 0
    assert START.stat().st_mode & 0o111 == 0o111
    (secret,) = compose["secrets"]
    assert f"/run/secrets/{secret}\n" in START.read_text(encoding="utf-8")
