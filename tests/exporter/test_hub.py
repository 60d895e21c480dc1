from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from exporter.hub import find_draft_head, find_model
from flowspec_edge.errors import CheckpointError
from flowspec_edge.manifest import load_manifest
from tests.exporter.checkpoints import save_checkpoint
from tests.exporter.gguf.conftest import write_gguf
from tests.exporter.gguf.models import SHAPE, fields, random_tensors

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cache(home: Path, repo: str, files: dict[str, bytes]) -> Path:
    """A repository in the cache of huggingface_hub, in its layout: blobs, and a snapshot that links to them."""
    root = home / "hub" / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    for directory in (snapshot, root / "blobs", root / "refs"):
        directory.mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    for number, (name, content) in enumerate(files.items()):
        blob = root / "blobs" / f"{number:040}"
        blob.write_bytes(content)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    return snapshot


@dataclass
class Hub:
    """A server with the two routes of the hub that a download takes."""

    files: dict[str, bytes]
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path, send_body = request.path.partition("?")[0], request.command == "GET"
        if path.startswith("/api/models/org/model"):
            body = json.dumps(
                {"id": "org/model", "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files]}
            ).encode()
            self._send(request, 200, body, {}, send_body=send_body)
        elif path.startswith(f"/org/model/resolve/{COMMIT}/") and (name := path.split(f"{COMMIT}/")[1]) in self.files:
            self.asked.append(name)
            etag = {"X-Repo-Commit": COMMIT, "ETag": f'"{abs(hash(name)):040x}"'}
            self._send(request, 200, self.files[name], etag, send_body=send_body)
        else:
            self._send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"}, send_body=send_body)

    def _send(
        self, request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str], *, send_body: bool
    ) -> None:
        request.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(name, value)
        request.end_headers()
        if send_body:
            request.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[Hub]:
    served = Hub({})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.answer(self)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_port}"
    yield served
    server.shutdown()
    thread.join()
    server.server_close()


def find(name: str, home: Path, **environment: str) -> str:
    """What a process with these settings of the hub finds: the path, or the error. They are read at its start."""
    program = (
        "import sys; from exporter.hub import find_model; from flowspec_edge.errors import CheckpointError\n"
        "try: print(find_model(sys.argv[1]))\n"
        "except CheckpointError as error: print('error:', error)"
    )
    settings = {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", program, name],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_directory_and_a_gguf_file_stand_for_themselves(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"GGUF")
    assert find_model(str(tmp_path)) == tmp_path
    assert find_model(str(tmp_path / "blob")) == tmp_path / "blob"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text.txt", "is a file, but no GGUF file"),
        ("./model/here", r"no such directory or file, and no name on the hub, as ORG/REPO"),
        ("model", r"no such directory or file, and no name on the hub"),
        ("a/b/c", r"no such directory or file, and no name on the hub"),
        ("/org/model.gguf", r"no such directory or file, and no name on the hub"),
    ],
)
def test_what_is_no_model_is_told_apart(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(CheckpointError, match=message):
        find_model(name)


def test_repositories_in_the_cache_are_found_without_a_network(tmp_path: Path) -> None:
    checkpoint = cache(tmp_path, "org/model", {"config.json": b"{}", "model.safetensors": b""})
    quantised = cache(tmp_path, "org/model-GGUF", {"model.Q4_K_M.gguf": b"GGUF"})
    offline = {"HF_HUB_OFFLINE": "1"}
    assert find("org/model", tmp_path, **offline) == str(checkpoint)
    assert find("org/model-GGUF:model.Q4_K_M.gguf", tmp_path, **offline) == str(quantised / "model.Q4_K_M.gguf")
    assert "org/model-GGUF: has no file model.Q8_0.gguf" in find("org/model-GGUF:model.Q8_0.gguf", tmp_path, **offline)
    assert "name one, as org/model-GGUF:model.Q4_K_M.gguf" in find("org/model-GGUF", tmp_path, **offline)
    assert "org/other: no such directory, and not in the cache of the hub" in find("org/other", tmp_path, **offline)


def test_only_the_files_that_are_needed_are_fetched(hub: Hub, tmp_path: Path) -> None:
    wanted = ["config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    others = ["README.md", "pytorch_model.bin", "consolidated.safetensors", "original/model.safetensors", "tf_model.h5"]
    hub.files = {name: name.encode() for name in (*wanted, *others)}
    found = Path(find("org/model", tmp_path, HF_ENDPOINT=hub.url))
    assert sorted(path.name for path in found.iterdir()) == wanted
    assert (found / "config.json").read_bytes() == b"config.json"
    assert set(hub.asked) == set(wanted)
    hub.asked.clear()
    assert find("org/model", tmp_path, HF_ENDPOINT=hub.url) == str(found)
    assert find("org/model", tmp_path, HF_HUB_OFFLINE="1") == str(found)
    assert hub.asked == []  # it is in the cache


def test_all_parts_of_a_file_are_fetched(hub: Hub, tmp_path: Path) -> None:
    parts = [f"Q4/big-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    hub.files = {name: b"GGUF" for name in (*parts, "big-Q8.gguf", "README.md")}
    found = find("org/model:Q4/big-00001-of-00003.gguf", tmp_path, HF_ENDPOINT=hub.url)
    assert found.endswith(parts[0])
    assert set(hub.asked) == set(parts)
    assert "org/model: has no file big-Q2.gguf; its GGUF files: " in find(
        "org/model:big-Q2.gguf", tmp_path, HF_ENDPOINT=hub.url
    )


def test_a_checkpoint_is_exported_by_its_name_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "target", num_hidden_layers=1)
    hub.files = {path.name: path.read_bytes() for path in (tmp_path / "target").iterdir()}
    done = subprocess.run(
        [sys.executable, "-m", "exporter", "org/model", "--out", tmp_path / "out", "--precision", "fp32"],
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_ENDPOINT": hub.url},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert load_manifest(tmp_path / "out").name == "model"


def test_a_gguf_file_is_exported_by_its_name_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "made.gguf", fields(SHAPE, 1), random_tensors(SHAPE, ["Q4_0"]))
    hub.files = {"tiny-Q4_0.gguf": path.read_bytes()}
    done = subprocess.run(
        [sys.executable, "-m", "exporter", "org/model:tiny-Q4_0.gguf", "--out", tmp_path / "out"],
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_ENDPOINT": hub.url},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    manifest = load_manifest(tmp_path / "out")
    assert (manifest.name, manifest.precision) == ("tiny-Q4_0", "own")


def test_a_gguf_file_is_told_apart_from_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="is a GGUF file; draft heads are read as they were published"):
        find_draft_head(str(tmp_path / "model.gguf"))


def test_a_repository_that_does_not_exist_is_told(hub: Hub, tmp_path: Path) -> None:
    assert "no such repository on the hub" in find("org/nothing", tmp_path, HF_ENDPOINT=hub.url)


def test_a_hub_that_cannot_be_reached_is_told(tmp_path: Path) -> None:
    found = find("org/model", tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert "org/model: no such directory, and not in the cache of the hub, which cannot be reached" in found
