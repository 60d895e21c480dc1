"""``flowspec devices``: who is there."""

from __future__ import annotations

import json
from dataclasses import dataclass

from flowspec_edge.cli.options import (
    Commands,
    SearchArguments,
    access_from,
    add_network,
    add_search,
    search,
    set_command,
)


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
    from flowspec_edge.node.node import ask_nodes

    access = access_from(options)
    devices = await ask_nodes(await search(options, access), options.cluster, access.credentials)
    if options.json:
        print(json.dumps(devices))
        return 0
    print(f"{'NODE':32} {'ADDRESS':22} {'VERSION':8} {'FREE':>10}  STATE")
    for device in devices:
        free = device["free_memory_bytes"]
        free_text = "-" if free is None else f"{free / 2**20:.0f} MiB"
        print(f"{device['node']:32} {device['address']:22} {device['version']:8} {free_text:>10}  {device['state']}")
    return 0
