"""``flowspec doctor`` as it is called; ``run_doctor.py`` does it."""

from __future__ import annotations

import argparse
from typing import Any

from flowspec_edge.cli.options import access_from, add_bundle, add_network, bundle_from

DOCTOR_S = 7.0
"""How long doctor listens: a silent address is given up after 5 s, and what peers tell comes before."""


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
    from flowspec_edge.cli.run_doctor import run_doctor

    return await run_doctor(options, access_from(options), bundle_from(options))
