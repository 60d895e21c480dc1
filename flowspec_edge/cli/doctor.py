"""``flowspec doctor`` as it is called; ``run_doctor.py`` does it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from flowspec_edge.cli.options import (
    BundleArguments,
    Commands,
    NetworkArguments,
    access_from,
    add_bundle,
    add_network,
    bundle_from,
    neighbourhood_from,
    set_command,
)
from flowspec_edge.net.addresses import EVERY_INTERFACE

DOCTOR_S = 7.0
"""How long doctor listens: a silent address is given up after 5 s, and what peers tell comes before."""


@dataclass(frozen=True, kw_only=True)
class DoctorCommand(NetworkArguments, BundleArguments):
    wait: float
    json: bool


def add_doctor(commands: Commands) -> None:
    doctor = commands.add_parser("doctor", help="why boards do not find each other, and the command that mends it")
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
    set_command(doctor, DoctorCommand, _doctor)


async def _doctor(options: DoctorCommand) -> int:
    from flowspec_edge.cli.run_doctor import run_doctor

    access, bundle = access_from(options), bundle_from(options)
    if options.host is None:
        access = dataclasses.replace(
            access, host=EVERY_INTERFACE
        )  # doctor does not listen, so it needs no key for that
    return await run_doctor(neighbourhood_from(options, access), bundle, wait_s=options.wait, is_json=options.json)
