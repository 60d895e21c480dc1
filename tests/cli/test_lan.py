"""Five hosts with addresses of their own find each other, with multicast and without, and say why where they do not."""

import asyncio
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from flowspec_edge.core.cluster.key_text import format_key
from flowspec_edge.net.auth import make_key
from tests.lan import Lan, lan_of
from tests.narrowing import present

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("lan_is_possible")]

NUM_HOSTS = 5
FOUND_AGAIN_S = 15
"""What is promised; it takes a second or two."""
WAIT_S = 60
"""A bound, no figure: `python -m benchmarks.discovery` measures."""


async def until_joined(process: asyncio.subprocess.Process, names: set[str]) -> dict[str, str]:
    """Read what a node says until it has seen all of these; gives what it has seen, and where."""
    joined: dict[str, str] = {}
    async with asyncio.timeout(WAIT_S):
        while set(joined) != names:
            line = (await present(process.stderr).readline()).decode()
            assert line, f"the node ended; it had seen {joined}"
            if found := re.search(r"joined: (\S+) at (\S+)", line):
                joined[found[1]] = found[2]
    return joined


async def form(
    lan: Lan, *first_options: str, states: Sequence[Path], peers: tuple[str, ...] = ()
) -> list[dict[str, str]]:
    """Start all, the first one first; until every one has seen every other one."""
    nodes = []
    for number in range(NUM_HOSTS):
        env = {"FLOWSPEC_HOME": str(states[number])}
        options = peers if number else first_options
        nodes.append(asyncio.create_task(lan.start_node(number, *options, env=env, is_verbose=True)))
    processes = [(await node)[0] for node in nodes]
    everyone = {f"pi-{number}" for number in range(NUM_HOSTS)}
    return await asyncio.gather(
        *(until_joined(process, everyone - {f"pi-{number}"}) for number, process in enumerate(processes))
    )


@pytest.fixture
def states(state: Path, tmp_path: Path) -> list[Path]:
    """A place per host, with the same key."""
    make_key()
    places = [tmp_path / f"host-{number}" for number in range(NUM_HOSTS)]
    for place in places:
        place.mkdir(mode=0o700)
        (place / "cluster.key").write_text((state / "cluster.key").read_text())
        (place / "cluster.key").chmod(0o600)
    return places


async def test_a_second_board_joins_by_the_line_that_the_first_one_prints(tmp_path: Path) -> None:
    async with lan_of(2) as lan, asyncio.timeout(2 * WAIT_S):
        first, second = ({"FLOWSPEC_HOME": str(tmp_path / name)} for name in ("first", "second"))
        node = await lan.start(0, "node", "--name", "pi-0", "--threads", "1", env=first)
        said = ""
        while "&& flowspec node" not in said:
            line = (await present(node.stdout).readline()).decode()
            assert line, (await present(node.stderr).read()).decode()
            said += line
        (key,) = re.findall(r"^    flowspec key set (\S+) && flowspec node$", said, re.MULTILINE)
        assert (tmp_path / "first/cluster.key").stat().st_mode & 0o777 == 0o600
        status, out, err = await lan.run(1, "key", "set", key, env=second)
        assert (status, err) == (0, "") and key not in out
        process, _ = await lan.start_node(1, env=second, is_verbose=True)
        assert await until_joined(process, {"pi-0"}) == {"pi-0": f"{lan.address(0)}:7361"}


async def test_five_hosts_without_a_router_see_each_other(states: list[Path]) -> None:
    async with lan_of(NUM_HOSTS) as lan, asyncio.timeout(2 * WAIT_S):
        seen = await form(lan, states=states)
        assert seen[0] == {f"pi-{number}": f"{lan.address(number)}:7361" for number in range(1, NUM_HOSTS)}


async def findings_on(lan: Lan, number: int, place: Path, *options: str) -> tuple[dict[str, dict[str, Any]], int]:
    """What doctor says there, by node or, without one, by address; and its exit status."""
    command = ("doctor", "--json", *options)
    status, out, err = await lan.run(number, *command, env={"FLOWSPEC_HOME": str(place)})
    assert out, err
    return {peer["node"] or peer["address"]: peer for peer in json.loads(out)["peers"]}, status


async def test_with_multicast_dropped_one_peer_is_enough_and_doctor_names_it(states: list[Path]) -> None:
    async with lan_of(NUM_HOSTS) as lan, asyncio.timeout(2 * WAIT_S):
        lan.drop_multicast()
        await form(lan, states=states, peers=("--peer", lan.address(0)))
        remembered = json.loads((states[4] / "peers.json").read_text())
        ((_, addresses),) = remembered.items()
        assert f"{lan.address(0)}:7361" in addresses
        findings, status = await findings_on(lan, 4, states[4], "--wait", "3")
        assert {node: peer["reason"] for node, peer in findings.items()} == {
            **{f"pi-{number}": "multicast blocked" for number in range(4)},
            "pi-4": "ready",
        }
        assert status == 1
        assert "5353/udp" in findings["pi-0"]["remedy"]


async def test_doctor_suspects_an_access_point_that_keeps_its_clients_apart(states: list[Path]) -> None:
    async with lan_of(3) as lan, asyncio.timeout(2 * WAIT_S):
        lan.isolate_clients()
        known = [option for number in (1, 2) for option in ("--peer", lan.address(number))]
        findings, status = await findings_on(lan, 0, states[0], "--wait", "5", *known)
        assert {address: peer["reason"] for address, peer in findings.items()} == {
            f"{lan.address(number)}:7361": "AP isolation suspected" for number in (1, 2)
        }
        assert status == 1


async def test_doctor_tells_a_firewall_from_a_key_from_a_board_that_is_off(states: list[Path]) -> None:
    async with lan_of(4) as lan, asyncio.timeout(2 * WAIT_S):
        replace_key_in(states[2])
        lan.drop_tcp(3, 7361)
        await asyncio.gather(
            *(lan.start_node(n, env={"FLOWSPEC_HOME": str(states[n])}, is_verbose=True) for n in (1, 2, 3))
        )
        off = ("--peer", f"{lan.address(200)}", "--peer", "10.99.0.1", "--peer", f"{lan.address(1)}:9")
        findings, status = await findings_on(lan, 0, states[0], *off)
        assert {node: peer["reason"] for node, peer in findings.items()} == {
            "pi-1": "ready",
            "pi-2": "other key",
            "pi-3": "firewall",
            f"{lan.address(200)}:7361": "unreachable address",
            "10.99.0.1:7361": "unreachable address",
            f"{lan.address(1)}:9": "unreachable address",
        }
        assert findings["pi-3"]["remedy"].startswith("sudo ufw allow 7361/tcp on pi-3")
        assert "flowspec key set" in findings["pi-2"]["remedy"]
        assert "no router brings packets there" in findings["10.99.0.1:7361"]["detail"]
        assert "off, or has another address" in findings[f"{lan.address(200)}:7361"]["detail"]
        assert status == 1


def replace_key_in(place: Path) -> None:
    (place / "cluster.key").write_text(format_key(bytes(20)))


async def test_boards_whose_networks_change_find_each_other_again(states: list[Path]) -> None:
    """A new address, a cable that is out for a while, another card, and a board that is in no network at its start."""
    async with lan_of(3) as lan, asyncio.timeout(2 * WAIT_S):
        lan.remove_card(2, "eth0")
        starts = (lan.start_node(n, env={"FLOWSPEC_HOME": str(states[n])}, is_verbose=True) for n in range(3))
        first, second, late = [process for process, _ in await asyncio.gather(*starts)]
        await until_said(second, "joined: pi-0 at 10.83.0.1:7361")
        await until_said(first, "joined: pi-1 at 10.83.0.2:7361")
        lan.readdress(0)
        took_s = [await until_said(second, f"pi-0 .*{lan.address(0)}:7361")]
        lan.pull(0)
        await until_said(first, "lost: pi-1")
        lan.plug(0)
        took_s.append(await until_said(first, "joined: pi-1 at 10.83.0.2:7361"))
        lan.remove_card(0, "eth0")
        await until_said(first, "lost: pi-1")
        lan.add_card(0, "wlan1", "10.83.0.9")
        took_s.append(await until_said(first, "joined: pi-1 at 10.83.0.2:7361"))
        took_s.append(await until_said(second, "pi-0 .*10.83.0.9:7361"))
        lan.add_card(2, "eth0", "10.83.0.10")
        took_s.append(await until_said(late, "joined: pi-1 at 10.83.0.2:7361"))
        print("found again after", ", ".join(f"{seconds:.1f} s" for seconds in took_s))
        assert max(took_s) < FOUND_AGAIN_S


async def until_said(process: asyncio.subprocess.Process, pattern: str) -> float:
    """Seconds until a node logs this."""
    began = time.monotonic()
    async with asyncio.timeout(WAIT_S):
        while True:
            line = (await present(process.stderr).readline()).decode()
            assert line, f"the node ended before it said {pattern}"
            if re.search(pattern, line):
                return time.monotonic() - began
