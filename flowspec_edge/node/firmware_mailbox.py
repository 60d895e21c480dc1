"""Asks a Raspberry Pi's firmware what its power chip measures, as ``vcgencmd pmic_read_adc`` does.

The kernel passes messages on at /dev/vcio, which the group ``video`` may open. A Raspberry Pi 5 answers with volts and
amperes of each rail that its power chip makes; what goes to USB at 5 V, and what the chip itself loses, is in none.
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
from pathlib import Path

VCIO = Path("/dev/vcio")
_PROPERTY = 0xC0086400
"""IOCTL_MBOX_PROPERTY: _IOWR(100, 0, char *) of a 64-bit system (github.com/raspberrypi/utils, vcgencmd.c)."""
_GET_GENCMD_RESULT = 0x00030080
_MESSAGE = struct.Struct("<6I1024sI")
"""Its size, a request's 0; tag, room, length, error; the text; and the tag that ends a message."""
_VALUE = re.compile(r"(\w+)_([AV])\s+(?:current|volt)\(\d+\)=(\d+\.?\d*)[AV]")


def ask_firmware(command: str, path: Path = VCIO) -> str:
    """What the firmware answers to a command. Raises OSError where it cannot be asked, or does not know it."""
    message = bytearray(_MESSAGE.pack(_MESSAGE.size, 0, _GET_GENCMD_RESULT, 1024, 0, 0, command.encode(), 0))
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(file, _PROPERTY, message, True)
    finally:
        os.close(file)
    *_, error, text, _ = _MESSAGE.unpack(message)
    if error:
        raise OSError(f"the firmware does not know {command}")
    return bytes(text).partition(b"\0")[0].decode(errors="replace")


def read_rails_w(answer: str) -> float | None:
    """The watts of all rails of which the answer to ``pmic_read_adc`` has volts and amperes; None where it has none."""
    values = {(name, unit): float(value) for name, unit, value in _VALUE.findall(answer)}
    found = [
        amperes * values[name, "V"] for (name, unit), amperes in values.items() if (name, "V") in values and unit == "A"
    ]
    return sum(found) if found else None
