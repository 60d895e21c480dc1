"""Which network a command works on: this machine alone, or every interface with a key."""

import json
import os

import pytest

from flowspec_edge.cli.access import (
    INSECURE_WARNING,
    Access,
    check_name,
    joining_text,
    neighbourhood,
    open_access,
)
from flowspec_edge.cli.key import SetKeyCommand, ShowKeyCommand, make_new_key, show_key, take_key
from flowspec_edge.core.cluster.address import Address
from flowspec_edge.core.cluster.key_text import format_key, parse_key
from flowspec_edge.errors import ClusterKeyError, KeyTextError, RequestError
from flowspec_edge.net.auth import key_path, load_key, make_key
from flowspec_edge.node.node import Node
from flowspec_edge.node.resources import NodeSettings
from tests.narrowing import present


def test_without_a_key_there_is_this_machine_only() -> None:
    access = open_access(None, is_insecure=False)
    assert (access.host, access.credentials, access.fingerprint) == ("127.0.0.1", None, "")
    with pytest.raises(
        ClusterKeyError, match=r"--host 0\.0\.0\.0 is open .*flowspec key set.*flowspec key new.*--insecure"
    ):
        open_access("0.0.0.0", is_insecure=False)
    assert load_key() is None


def test_a_first_node_makes_the_key_and_listens_everywhere() -> None:
    access = open_access(None, is_insecure=False, makes_key=True)
    assert access.host == "0.0.0.0"
    assert parse_key(present(access.new_key)) == load_key()
    again = open_access(None, is_insecure=False, makes_key=True)
    assert (again.new_key, again.fingerprint) == (None, access.fingerprint)
    assert open_access(None, is_insecure=False).fingerprint == access.fingerprint


def test_loopback_neither_needs_nor_makes_a_key() -> None:
    assert open_access("localhost", is_insecure=False, makes_key=True).credentials is None
    assert load_key() is None


def test_insecure_says_each_time_what_it_means(capsys: pytest.CaptureFixture[str]) -> None:
    make_key()
    for _ in range(2):
        access = open_access("0.0.0.0", is_insecure=True, makes_key=True)
        assert (access.credentials, access.is_insecure) == (None, True)
        assert INSECURE_WARNING in capsys.readouterr().err


def test_a_node_says_how_others_join() -> None:
    first = open_access(None, is_insecure=False, makes_key=True)
    line = f"\n    flowspec key set {first.new_key} && flowspec node"
    assert joining_text(first, "flowspec", shows_key=False).endswith(line), "nobody knows a new key yet"
    again = open_access(None, is_insecure=False, makes_key=True)
    assert joining_text(again, "home", shows_key=True).endswith(f"{line} --cluster home")
    assert str(first.new_key) not in (text := joining_text(again, "flowspec", shows_key=False))
    assert "`flowspec key show`" in text
    local = open_access("127.0.0.1", is_insecure=False)
    assert "this machine alone" in joining_text(local, "flowspec", shows_key=True)
    unprotected = open_access("0.0.0.0", is_insecure=True)
    told = joining_text(unprotected, "home", shows_key=False)
    assert told.endswith("\n    flowspec node --insecure --host 0.0.0.0 --cluster home")


async def test_a_node_refuses_the_network_without_a_key() -> None:
    with pytest.raises(ClusterKeyError, match="node pi: 0.0.0.0 is open to the network"):
        await Node.start(NodeSettings(name="pi", cluster="x", host="0.0.0.0"))


async def test_key_commands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClusterKeyError, match="flowspec key new"):
        await show_key(ShowKeyCommand())
    await make_new_key(ShowKeyCommand())
    key = capsys.readouterr().out.splitlines()[0]
    await show_key(ShowKeyCommand(qr=True))
    told = capsys.readouterr().out
    assert f"flowspec key set {key} && flowspec node" in told
    assert "\u2580" in told, "the line as a code to scan"
    other = format_key(bytes(20))
    reading, writing = os.pipe()
    os.write(writing, f"{other}\n".encode())
    os.close(writing)
    with os.fdopen(reading) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        await take_key(SetKeyCommand(key="-"))
    told = capsys.readouterr().out
    assert key not in told and other not in told
    assert "cluster.key.old" in told
    await show_key(ShowKeyCommand(json=True))
    report = json.loads(capsys.readouterr().out)
    assert (report["key"], report["file"]) == (other, str(key_path()))
    with pytest.raises(KeyTextError):
        await take_key(SetKeyCommand(key="password"))
    assert load_key() == bytes(20)


def test_peers_that_are_typed() -> None:
    def peers(host: str | None, *texts: str) -> tuple[Address, ...]:
        return neighbourhood("home", texts, open_access(host, is_insecure=False)).peers

    assert peers("127.0.0.1", "localhost:9") == (Address("localhost", 9),)
    with pytest.raises(RequestError, match="--peer 'pi:x' is no address"):
        peers(None, "pi:x")
    with pytest.raises(ClusterKeyError, match=r"--peer 10\.0\.0\.1 is beyond this machine.*flowspec key set"):
        peers(None, "10.0.0.1")
    make_key()
    assert peers(None, "10.0.0.1", "pi.local:80") == (Address("10.0.0.1", 7361), Address("pi.local", 80))


@pytest.mark.parametrize("name", ["", "pi\x1b[31m", "a\nb", "\u202egnirts", "\ud800", "x" * 201, "é" * 101])
def test_names_that_no_peer_would_take_are_refused(name: str) -> None:
    with pytest.raises(RequestError, match="--name .* is no name; give 1 to 200 bytes without control characters"):
        check_name("--name", name)
    with pytest.raises(RequestError, match="--cluster .* is no name"):
        neighbourhood(name, [], Access("127.0.0.1"))


def test_names_that_people_give_are_taken() -> None:
    for name in ("pi-küche", "x" * 200, "台所"):
        check_name("--name", name)
