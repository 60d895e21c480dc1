"""The wheel: what is in it, what it asks for, and that it runs the demo without the clone."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from docs.house import ROOT
from tests.bundles import MadeOnce
from tests.narrowing import present

PACKAGES = ("flowspec_edge", "exporter", "firmware_configs")
LEFT_OUT = ("exporter/demo_model", "firmware_configs/container")
"""Of a clone alone: what the demo model is exported from, and what the image is made of."""
MAX_BYTES = 40_000_000
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(made_once: MadeOnce) -> Path:
    """Built from a copy, since setuptools leaves things beside the sources."""

    def build(directory: Path) -> None:
        source = directory / "source"
        source.mkdir()
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy2(ROOT / name, source)
        for package in PACKAGES:
            shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
        subprocess.run([sys.executable, "-c", BUILD, directory], cwd=source, check=True, capture_output=True)

    (built,) = made_once("wheel", build).glob("*.whl")
    return built


@pytest.fixture(scope="module")
def said(wheel: Path) -> Message:
    """What it says of itself."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def named(requirement: str) -> str:
    """The name of a distribution, as indexes write it."""
    return re.sub(r"[-_.]+", "-", present(re.match(r"[\w.-]+", requirement)).group()).lower()


def files_of_packages() -> Iterator[str]:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*"):
            name = path.relative_to(ROOT).as_posix()
            if path.is_file() and "__pycache__" not in path.parts and not name.startswith(LEFT_OUT):
                yield name


def test_it_has_the_packages_and_nothing_else_and_is_small(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        there = {name for name in archive.namelist() if ".dist-info/" not in name}
        beside = {name.partition(".dist-info/")[2] for name in archive.namelist()} - {""}
    assert there == set(files_of_packages())
    assert {"licenses/LICENSE", "entry_points.txt"} <= beside
    assert wheel.stat().st_size < MAX_BYTES
    assert wheel.name.endswith("-py3-none-any.whl"), "one for all boards"


def test_it_says_what_it_needs(said: Message) -> None:
    assert (said["Name"], said["Requires-Python"]) == ("flowspec-edge", PROJECT["requires-python"])
    assert said["License-Expression"] == "Apache-2.0"
    needed = [line for line in said.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert set(map(named, needed)) == set(map(named, PROJECT["dependencies"]))
    for target in PROJECT["scripts"].values():
        module, _, function = target.partition(":")
        assert callable(getattr(import_module(module), function))


@pytest.mark.slow
async def test_it_runs_the_demo_where_the_clone_is_not(wheel: Path, tmp_path: Path) -> None:
    """With what a wheel installs, and the libraries of this environment; the text is the unsplit model's."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    empty = tmp_path / "empty"
    empty.mkdir()
    code = "import runpy, flowspec_edge as f; print(f.__file__); runpy.run_module(f.__name__, None, '__main__')"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code, "demo", "--json", "--nodes", "4", "--max-new-tokens", "40"),
        cwd=empty,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert (process.returncode, err.decode()) == (0, "")
    where, line = out.decode().splitlines()
    assert Path(where).is_relative_to(tmp_path)
    report = json.loads(line)
    assert set(report) == {
        *("nodes", "prompt", "text", "token_ids", "autoregressive_token_ids", "identical", "acceptance_length"),
        *("trips", "rows_sent", "rows_useful", "tokens_per_s", "ring"),
    }
    assert report["nodes"] == 4
    assert report["identical"] is True
    assert report["token_ids"] == report["autoregressive_token_ids"]
    assert len(report["token_ids"]) == 40
    assert [(stage["start"], stage["stop"]) for stage in report["ring"]] == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert 0 < report["rows_useful"] <= report["rows_sent"]
    assert not list(empty.iterdir())
