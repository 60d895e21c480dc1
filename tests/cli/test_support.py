"""The archive for whoever helps: what it has, and above all what it has not."""

import asyncio
import sys
import tarfile
from pathlib import Path

import pytest

from flowspec_edge.cli.diagnostics import SECTIONS, Redaction
from flowspec_edge.core.cluster.key_text import API_PREFIX, format_key
from flowspec_edge.net.api_keys import add_api_key, load_api_keys
from flowspec_edge.net.auth import load_key, make_key
from tests.narrowing import present

KEY, API_KEY = format_key(bytes(range(20))), format_key(bytes(range(20)), API_PREFIX)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"flowspec key set {KEY} && x", "flowspec key set [key] && x"),
        (f"Authorization: Bearer {API_KEY.upper()}", "Authorization: [secret] [key]"),
        (KEY.replace("-", ""), "[key]"),
        ('{"api_key": "hunter2", "n": 1}', '{"api_key": "[secret]", "n": 1}'),
        ("FLOWSPEC_API_KEY=hunter2", "FLOWSPEC_API_KEY=[secret]"),
        ("/home/ada/models on kitchen, kitchenette", "~/models on HOST, kitchenette"),
        ("kitchen.local-ada", "HOST.local-USER"),
        ("192.168.1.20 8.8.8.8 1.2.3.4.5 300.1.1.1", "192.168.1.20 [public address] [public address].5 300.1.1.1"),
        ("at dc:a6:32:01:02:03", "at [hardware address]"),
        ("onnxruntime 1.32.0, fsk1 and fsa1-", "onnxruntime 1.32.0, fsk1 and fsa1-"),
    ],
)
def test_what_names_somebody_or_opens_something_is_replaced(text: str, shown: str) -> None:
    assert Redaction({"/home/ada": "~", "kitchen": "HOST", "ada": "USER"}).apply(text) == shown


@pytest.mark.slow
async def test_the_archive_has_every_section_and_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_key()
    api_key = add_api_key("phone")
    monkeypatch.setenv("FLOWSPEC_API_KEY", api_key)
    path = tmp_path / "support.tar.gz"
    command = (sys.executable, "-m", "flowspec_edge", "support", "--out", str(path), "--host", "127.0.0.1")
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    assert process.returncode == 0
    assert path.stat().st_mode & 0o777 == 0o600
    with tarfile.open(path) as archive:
        texts = {name: present(archive.extractfile(f"flowspec-support/{name}")).read().decode() for name in SECTIONS}
        assert len(archive.getnames()) == len(SECTIONS)
    assert all(name in out.decode() for name in SECTIONS)
    assert "onnxruntime 1." in texts["versions.txt"]
    assert "-rw-------" in texts["kept.txt"] and "api-keys.json" in texts["kept.txt"]
    assert '"peers": [' in texts["doctor.json"] and "(exit status" in texts["doctor.json"]
    everything = "".join(texts.values())
    for secret in (api_key, format_key(present(load_key())), load_api_keys()[0].digest):
        assert secret not in everything and secret.replace("-", "") not in everything
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    _, err = await process.communicate()
    assert process.returncode == 1 and b"cannot be written (File exists)" in err
