"""What the origin computes with is what the manifest says, or nothing is computed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flowspec_edge import manifest as manifests
from flowspec_edge.bundle import DEMO_BUNDLE, Bundle
from flowspec_edge.core.speculation.drafting import DraftShape
from flowspec_edge.errors import BundleError
from flowspec_edge.manifest import SEAL_NAME, verify_digests
from flowspec_edge.origin.engine import OriginEngine, origin_files


@pytest.fixture
def copied(tmp_path: Path) -> Bundle:
    return Bundle.load(shutil.copytree(DEMO_BUNDLE, tmp_path / "bundle"))


def damage(path: Path, num_bytes: int = 4000) -> None:
    """In the middle, with the same length."""
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    for at in range(middle, min(middle + num_bytes, len(data))):
        data[at] ^= 0x01
    path.write_bytes(data)


def test_a_whole_bundle_is_loaded(copied: Bundle) -> None:
    engine = OriginEngine(copied, 1, DraftShape())
    assert engine.drafter is not None and engine.tokenizer.encode("x")


@pytest.mark.parametrize("name", ["head.onnx", "drafter.onnx", "embedding.npy", "tokenizer.json"])
def test_damaged_files_are_named_before_anything_is_computed(copied: Bundle, name: str) -> None:
    damage(copied.directory / name, 40)
    with pytest.raises(BundleError, match=rf"bundle/{name}: sha256 is .* is damaged.*copy or export the bundle again"):
        OriginEngine(copied, 1, DraftShape())


def test_a_file_that_is_damaged_later_is_noticed_too(copied: Bundle) -> None:
    OriginEngine(copied, 1, DraftShape())
    damage(copied.directory / "head.onnx")
    with pytest.raises(BundleError, match="head.onnx: sha256 is"):
        OriginEngine(copied, 1, DraftShape())


@pytest.mark.parametrize("how", ["truncated", "removed", "replaced"])
def test_a_bundle_that_changes_underneath_is_named(copied: Bundle, how: str) -> None:
    path = copied.directory / "tokenizer.json"
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:100])
    elif how == "removed":
        path.unlink()
    else:
        path.unlink()
        path.mkdir()
    with pytest.raises(BundleError, match=r"tokenizer.json: (100 bytes|missing)"):
        OriginEngine(copied, 1, DraftShape())


def test_what_this_process_has_read_is_not_read_again(copied: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = manifests.sha256_of

    def counted(path: Path) -> str:
        read.append(path.name)
        return real(path)

    monkeypatch.setattr(manifests, "sha256_of", counted)
    files = origin_files(copied.manifest)
    for _ in range(3):
        verify_digests(copied.directory, files)
    assert sorted(read) == ["drafter.onnx", "embedding.npy", "head.onnx", "tokenizer.json"]
    (copied.directory / "head.onnx").touch()
    verify_digests(copied.directory, files)
    assert read[4:] == ["head.onnx"]


def test_a_damaged_manifest_is_named(copied: Bundle) -> None:
    path = copied.directory / "manifest.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e-03'))
    with pytest.raises(BundleError, match=rf"manifest.json: sha256 is .*{SEAL_NAME} says .*is damaged"):
        Bundle.load(copied.directory)
    (copied.directory / SEAL_NAME).unlink()
    assert Bundle.load(copied.directory).digest != copied.digest, "whoever takes the sum away means it"


def test_a_written_manifest_is_sealed_as_sha256sum_does(copied: Bundle) -> None:
    copied.manifest.write(copied.directory)
    assert Bundle.load(copied.directory) == copied
    assert (copied.directory / SEAL_NAME).read_text() == f"{copied.digest}  manifest.json\n"
    assert (copied.directory / SEAL_NAME).read_text() == (DEMO_BUNDLE / SEAL_NAME).read_text()
