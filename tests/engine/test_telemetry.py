"""ONNX Runtime keeps to itself: it tells nobody that it runs, and leaves no file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("package", ["flowspec_edge.engine", "exporter"])
def test_onnx_runtime_is_loaded_without_its_telemetry(package: str, tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    code = f"import {package}, onnxruntime"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=60)
    assert list(tmp_path.iterdir()) == [], "its session file: it would be sent"
