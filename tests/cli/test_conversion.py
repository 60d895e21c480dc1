"""GGUF files that are named where a bundle is asked for."""

import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

pytest.importorskip("gguf", reason="GGUF files need gguf: pip install '.[gguf]'")

from flowspec_edge.cli import conversion
from flowspec_edge.cli.conversion import bundle_of
from flowspec_edge.cli.main import main
from flowspec_edge.errors import BundleError
from flowspec_edge.files import conversions_directory
from flowspec_edge.manifest import load_manifest
from tests.exporter.gguf.conftest import write_gguf
from tests.exporter.gguf.models import SHAPE, fields, random_tensors

pytestmark = pytest.mark.slow


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "small.gguf", fields(SHAPE, 2), random_tensors(SHAPE, ["Q4_1", "Q6_K"]))


def bundles() -> list[Path]:
    return sorted(entry for entry in conversions_directory().iterdir() if entry.suffix != ".lock")


def test_a_command_takes_a_gguf_file_and_converts_it_once(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", str(path), "--testbed", "jetson4-7b-fp16-1gbit"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert "making a bundle of small.gguf, once: 2 of 2 layers" in err
    (directory,) = bundles()
    assert load_manifest(directory).name == "small"
    assert main(command) == 0
    assert capsys.readouterr() == (out, ""), "the same plan, and nothing was made"
    assert bundles() == [directory]


def test_two_processes_at_once_make_one_bundle(path: Path) -> None:
    code = "import sys; from pathlib import Path; from flowspec_edge.cli.conversion import bundle_of; "
    command = [sys.executable, "-c", f"{code}print(bundle_of(Path(sys.argv[1])))", str(path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, **pipes) for _ in range(2)]  # type: ignore[call-overload]  # of two types
    told = [process.communicate(timeout=120) for process in running]
    (directory,) = bundles()
    assert [out.strip() for out, _ in told] == [str(directory)] * 2
    assert sorted("making a bundle" in err for _, err in told) == [False, True]
    assert any("another process makes its bundle, waiting for it" in err for _, err in told)


def test_another_exporter_or_another_file_makes_another_bundle_and_what_a_killed_one_left_is_removed(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = bundle_of(path)
    older = directory.with_name(f"{directory.name[:-8]}00000000")
    directory.rename(older)
    (directory.parent / f".{directory.name}.abc.part").mkdir()
    capsys.readouterr()
    assert bundle_of(path) == directory
    assert bundles() == sorted((older, directory))
    told = f"small.gguf: {older} is the bundle that an earlier exporter made of it; remove it"
    assert told in capsys.readouterr().err
    assert bundle_of(path) == directory and capsys.readouterr().err == "", "said once"
    write_gguf(path, fields(SHAPE, 1), random_tensors(SHAPE, ["Q8_0"]))
    other = bundle_of(path)
    assert bundles() == sorted((older, directory, other)) and "earlier exporter" not in capsys.readouterr().err
    assert [len(load_manifest(found).blocks) for found in (directory, other)] == [2, 1]


def test_an_exporter_is_known_by_its_code_texts_and_draft_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gguf").mkdir()
    (tmp_path / "heads/small").mkdir(parents=True)
    spec = ModuleSpec("exporter", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr("importlib.util.find_spec", {"exporter": spec}.get)
    found = [conversion._exporter_digest()]
    head = "heads/small/model.safetensors", "heads/small/config.json"
    for name in ("layer_graph.py", "gguf/model.py", "calibration.txt", "layer_graph.py", *head):
        with (tmp_path / name).open("a") as file:
            file.write("changed\n")
        found.append(conversion._exporter_digest())
    (tmp_path / "layer_graph.pyc").write_text("made of it")
    assert len(set(found)) == 7 and conversion._exporter_digest() == found[-1]


def test_a_file_of_which_none_can_be_made_says_why(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.truncate(path, path.stat().st_size - 1000)
    assert main(["plan", str(path)]) == 1
    assert f"flowspec plan: {path}: tensor output.weight ends at byte" in capsys.readouterr().err
    assert bundles() == []
    text = path.with_suffix(".txt")
    text.write_text("no model")
    with pytest.raises(BundleError, match=r"small\.txt: is a file, but no GGUF file"):
        bundle_of(text)


def test_a_place_that_cannot_be_written_is_named(path: Path, state: Path) -> None:
    (state / "converted").write_text("in the way")
    with pytest.raises(BundleError, match=r"small\.gguf: its bundle cannot be kept \(.*exists"):
        bundle_of(path)
