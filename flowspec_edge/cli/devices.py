"""``flowspec devices``: who is there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flowspec_edge.cli.layout import fitted, heat_and_power, table_lines, terminal_width
from flowspec_edge.cli.options import (
    Commands,
    SearchArguments,
    access_from,
    add_network,
    add_search,
    search,
    set_command,
)
from flowspec_edge.cli.show_search import SearchDisplay

READY = "ready"


@dataclass(frozen=True, kw_only=True)
class DevicesCommand(SearchArguments):
    json: bool


def add_devices(commands: Commands) -> None:
    devices = commands.add_parser("devices", help="list the nodes found, their memory and what they can serve")
    add_network(devices)
    add_search(devices)
    devices.add_argument("--json", action="store_true", help="print a JSON list")
    set_command(devices, DevicesCommand, _devices)


async def _devices(options: DevicesCommand) -> int:
    with SearchDisplay(options.cluster, is_quiet=options.json) as display:
        from flowspec_edge.node.node import ask_nodes

        access = access_from(options)
        found = await search(options, access, display=display)
    devices = await ask_nodes(found, options.cluster, access.credentials)
    if options.json:
        print(json.dumps(devices))
        return 0
    print(*device_lines(devices), sep="\n")
    return 0


def device_lines(devices: Sequence[dict[str, Any]]) -> list[str]:
    """A table of what nodes said of themselves, and below it why some did not answer."""
    is_sensed = any(heat_and_power(device) != "-" for device in devices)
    rows = [
        (
            device["node"],
            device["address"],
            device["version"],
            "-" if device["free_memory_bytes"] is None else f"{device['free_memory_bytes'] / 2**20:.0f} MiB",
            *((heat_and_power(device),) if is_sensed else ()),
            device["state"] if device["state"] == READY else "silent",
        )
        for device in devices
    ]
    reasons = [f"{device['node']}: {device['state']}" for device in devices if device["state"] != READY]
    width = terminal_width()
    columns = ("NODE", "ADDRESS", "VERSION", "FREE", *(("HEAT",) if is_sensed else ()), "STATE")
    return table_lines(columns, rows, ("FREE",)) + [fitted(reason, width) for reason in reasons]
