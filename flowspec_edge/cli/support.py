"""``flowspec support``: writes down what whoever is to help needs to know, without keys and names."""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

from flowspec_edge.cli.diagnostics import SECTIONS, Redaction
from flowspec_edge.cli.options import Commands, NetworkArguments, add_network, set_command
from flowspec_edge.errors import RequestError, system_words

DESCRIPTION = """\
Writes an archive with what whoever is to help needs to know: versions, processor, memory and interfaces, what
`flowspec doctor`, `devices` and `top` say, and the last lines of the service's log. Keys, public addresses, and the
names of this machine and its user are replaced; texts and prompts are in none of it. Look into it before you send it.
"""


@dataclass(frozen=True, kw_only=True)
class SupportCommand(NetworkArguments):
    out: Path | None


def add_support(commands: Commands) -> None:
    support = commands.add_parser(
        "support",
        help="write an archive of diagnostics, without keys, to send to whoever helps",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_network(support)
    support.add_argument(
        "--out", type=Path, metavar="FILE", help="archive to write (default: flowspec-support-DATE.tar.gz here)"
    )
    set_command(support, SupportCommand, _support)


async def _support(options: SupportCommand) -> int:
    path = options.out or Path(f"flowspec-support-{time.strftime('%Y%m%d-%H%M%S')}.tar.gz")
    if path.exists():  # said before what takes a while
        raise RequestError(f"{path} cannot be written (File exists); give another --out")
    network = ["--cluster", options.cluster, *(f"--peer={peer}" for peer in options.peer)]
    network += ["--host", options.host] if options.host else []
    network += ["--insecure"] if options.insecure else []
    redaction = Redaction.of_this_machine()
    texts = await asyncio.gather(*(collect(network) for collect in SECTIONS.values()))
    contents = {name: redaction.apply(text) for name, text in zip(SECTIONS, texts, strict=True)}
    _write(path, contents)
    print(f"{path} has {len(contents)} files, without {redaction.told}:")
    for name, text in contents.items():
        print(f"  {name:16} {len(text.splitlines())} lines")
    print(f"Look into it before you send it: tar -xzf {path}")
    return 0


def _write(path: Path, contents: dict[str, str]) -> None:
    """Raises RequestError where the file cannot be written."""
    try:
        with open(path, "xb", opener=_open_private) as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
            for name, text in contents.items():
                data = text.encode(errors="backslashreplace")
                entry = tarfile.TarInfo(f"flowspec-support/{name}")
                entry.size, entry.mtime, entry.mode = len(data), int(time.time()), 0o600
                archive.addfile(entry, io.BytesIO(data))
    except OSError as cause:
        raise RequestError(f"{path} cannot be written ({system_words(cause)}); give another --out") from cause


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
