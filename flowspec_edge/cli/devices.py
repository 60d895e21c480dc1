"""``flowspec devices`` and ``flowspec doctor``: who is there, and who is not, and why."""

from __future__ import annotations

import argparse
import json
from typing import Any

from flowspec_edge.cli.options import access_from, add_bundle, add_network, add_search, bundle_from, search

DOCTOR_S = 7.0
"""How long doctor listens: a silent address is given up after 5 s, and what peers tell comes before."""


def add_devices(commands: Any) -> None:
    devices: argparse.ArgumentParser = commands.add_parser(
        "devices", help="list the nodes found, their memory and what they can serve"
    )
    add_network(devices)
    add_search(devices)
    devices.add_argument("--json", action="store_true", help="print a JSON list")
    devices.set_defaults(run=_devices)


async def _devices(options: argparse.Namespace) -> int:
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


def add_doctor(commands: Any) -> None:
    doctor: argparse.ArgumentParser = commands.add_parser(
        "doctor", help="why boards do not find each other, and the command that mends it"
    )
    add_network(doctor)
    add_bundle(doctor)
    doctor.add_argument(
        "--wait",
        type=float,
        default=DOCTOR_S,
        metavar="S",
        help="listen this long (default: %(default)s; an address that stays silent takes 5)",
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.set_defaults(run=_doctor)


async def _doctor(options: argparse.Namespace) -> int:
    from flowspec_edge.cli.doctor import run_doctor

    return await run_doctor(options, access_from(options), bundle_from(options))
