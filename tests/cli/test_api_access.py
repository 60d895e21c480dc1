"""The API beyond this machine, as clients meet it: the printed lines run as they stand, with real clients."""

import asyncio
import json
import re
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from flowspec_edge.cli.api_access import ApiAccess, api_url, open_api_access, print_welcome
from flowspec_edge.cli.key import (
    AddApiKeyCommand,
    KeyCommand,
    RevokeApiKeyCommand,
    add_client_key,
    list_client_keys,
    revoke_client_key,
)
from flowspec_edge.client import Client
from flowspec_edge.errors import ApiKeyError, OtherKeyError, RequestError
from flowspec_edge.net.api_keys import load_api_keys, revoke_api_key
from flowspec_edge.net.server import serve_app
from flowspec_edge.web.app import build_app
from tests.narrowing import present
from tests.web.test_completions import PIECES, ScriptedGenerator

PROGRAM = """\
from openai import OpenAI
print(OpenAI(max_retries=0).completions.create(model="demo", prompt="x").choices[0].text)
"""


@asynccontextmanager
async def serving(*, is_plain: bool = False) -> AsyncIterator[tuple[ApiAccess, str]]:
    """A server on every interface, and its URL."""
    access = open_api_access("0.0.0.0", is_insecure=False, is_plain=is_plain)
    tls = None if access.certificate is None else access.certificate.context
    served = await serve_app(
        build_app(ScriptedGenerator(PIECES), access.guard), access.host, tls=tls, explains_tls=True
    )
    try:
        async with asyncio.timeout(30):
            yield access, api_url(access, served.port)
    finally:
        await served.close()


async def run_line(line: str) -> tuple[int, str]:
    """Exit status and output of a line in a shell."""
    process = await asyncio.create_subprocess_shell(
        line, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out, _ = await process.communicate()
    return present(process.returncode), out.decode()


def test_on_this_machine_there_is_neither_key_nor_tls() -> None:
    access = open_api_access("127.0.0.1", is_insecure=False, is_plain=False, names=["Pi.Example"])
    assert (access.guard.keys, access.certificate, access.scheme, access.new_key) == (None, None, "http", None)
    assert {"pi.example", "localhost"} <= access.guard.hosts
    assert api_url(access, 8008) == "http://127.0.0.1:8008/v1"
    assert load_api_keys() == []


def test_the_first_start_beyond_it_makes_a_key_and_says_how_to_trust(capsys: pytest.CaptureFixture[str]) -> None:
    access = open_api_access("0.0.0.0", is_insecure=False, is_plain=False)
    assert access.scheme == "https" and present(access.new_key).startswith("fsa1-")
    assert "0.0.0.0" not in api_url(access, 8008)
    print_welcome(access, api_url(access, 8008))
    told = capsys.readouterr().out
    assert told.count(present(access.new_key)) == 3
    again = open_api_access("0.0.0.0", is_insecure=False, is_plain=False)
    assert (again.new_key, again.has_new_authority) == (None, False)
    print_welcome(again, api_url(again, 8008))
    assert capsys.readouterr().out == ""
    plain = open_api_access("0.0.0.0", is_insecure=False, is_plain=True)
    assert plain.scheme == "http" and plain.guard.keys is not None
    assert "--plain-http: whoever listens" in capsys.readouterr().err


@pytest.mark.parametrize("origin", ["*", "null", "front.end", "http://front.end/page", "http://"])
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(RequestError, match=r"--cors-origin .* is no origin"):
        open_api_access("127.0.0.1", is_insecure=False, is_plain=False, origins=[origin])


def test_origins_are_taken_as_browsers_show_them() -> None:
    access = open_api_access(
        "127.0.0.1", is_insecure=False, is_plain=False, origins=["HTTP://Localhost:3000/", "app://obsidian.md"]
    )
    assert access.guard.origins == {"http://localhost:3000", "app://obsidian.md"}


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
async def test_the_printed_lines_run_as_they_stand(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("openai", reason="the client that it is tried with: pip install '.[dev]'")
    async with serving() as (access, url):
        print_welcome(access, url)
        told = capsys.readouterr().out
        curl, openai = re.findall(r"^    ((?:curl|SSL_CERT_FILE).*)$", told, re.MULTILINE)
        status, out = await run_line(f"{curl} -sS")
        assert (status, json.loads(out)["data"][0]["id"]) == (0, "demo")
        status, out = await run_line(curl.replace(present(access.new_key), "fsa1-qqqq") + " -sS")
        assert json.loads(out)["error"]["code"] == "invalid_api_key"
        status, out = await run_line(re.sub(r"--cacert \S+", "-sS", curl))
        assert status == 60, "who was not told whom to trust trusts nobody"
        status, out = await run_line(curl.replace("https://", "http://") + " -sS")
        assert json.loads(out)["error"]["code"] == "tls_required"
        (tmp_path / "program.py").write_text(PROGRAM)
        line = openai.replace("python3 PROGRAM", f"{sys.executable} {tmp_path / 'program.py'}")
        assert await run_line(line) == (0, "ab\n\n")


async def test_our_client_needs_the_key_alone_and_trusts_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as (access, url):
        key = present(access.new_key)
        bare = url.removeprefix("https://").removesuffix("/v1")
        for address in (url, bare):
            async with Client(address, api_key=key) as client:
                assert (await client.complete("x")).text == "ab\n"
                assert await client.models() == ["demo"]
        for wrong in ("fsa1-qqqq-qqqq", None):
            async with Client(f"https://{bare}", api_key=wrong) as stranger:
                with pytest.raises(OtherKeyError, match="API key"):
                    await stranger.complete("x")
        async with Client(f"https://{bare}", api_key=key) as client:
            assert await client.models() == ["demo"]
            revoke_api_key("first")
            with pytest.raises(ApiKeyError):
                await client.models()


async def test_over_plain_http_the_key_is_wanted_all_the_same() -> None:
    async with serving(is_plain=True) as (access, url):
        async with Client(url) as stranger:
            with pytest.raises(ApiKeyError, match="missing or wrong"):
                await stranger.complete("x")
        async with Client(url, api_key=access.new_key, allows_plain_http=True) as client:
            assert (await client.complete("x")).text == "ab\n"


async def test_key_commands(capsys: pytest.CaptureFixture[str]) -> None:
    await list_client_keys(KeyCommand())
    assert "flowspec key api add NAME" in capsys.readouterr().out
    await add_client_key(AddApiKeyCommand(name="phone", qr=True))
    out = capsys.readouterr().out
    assert out.startswith("fsa1-") and "█" in out
    await add_client_key(AddApiKeyCommand(name="laptop", json=True))
    assert json.loads(capsys.readouterr().out)["key"].startswith("fsa1-")
    await list_client_keys(KeyCommand(json=True))
    assert [key["name"] for key in json.loads(capsys.readouterr().out)["keys"]] == ["phone", "laptop"]
    await revoke_client_key(RevokeApiKeyCommand(name="phone"))
    capsys.readouterr()
    await list_client_keys(KeyCommand())
    assert re.fullmatch(r"laptop  added \d{4}-\d\d-\d\d\n", capsys.readouterr().out)
