"""Broken inputs, each of them made by a seeded generator: bytes that were changed, and values of any shape."""

from __future__ import annotations

import math
import random
from typing import Any

NASTY_TEXTS = (
    *("", "\0", "\x1b[31mred", "a\nb", "\x9b1m", "\u202egnirts", "\x7f", "../../etc/passwd", "/", "\u2028", "x" * 5000),
    *("ring-1/0", "127.0.0.1", "pi-hall", "0" * 64, "é" * 64, "%s%n", "control", "data"),
)
NASTY_NUMBERS = (
    *(0, 1, -1, 2, 7, 63, 64, 65, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)),
    *(0.0, -0.0, 0.5, 1e308, -1e308, math.inf, -math.inf, math.nan),
)


def changed(rng: random.Random, data: bytes) -> bytes:
    """The bytes after a few random changes: bits flipped, pieces cut out, doubled, or put in from elsewhere."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(out) + 1)
        length = rng.choice((1, 1, 2, 4, 16, 64))
        match rng.randrange(6):
            case 0 if out:
                out[at % len(out)] ^= 1 << rng.randrange(8)
            case 1:
                del out[at : at + length]
            case 2:
                out[at:at] = out[at : at + length]
            case 3:
                out[at : at + length] = rng.randbytes(length)
            case 4:
                del out[at:]
            case _ if out:
                out[at % len(out)] = rng.choice((0, 1, 0x7F, 0x80, 0x90, 0xC1, 0xDD, 0xFF))
    return bytes(out)


def value(rng: random.Random, depth: int = 3, *, has_bytes: bool = True) -> Any:
    """Anything that msgpack has, or JSON where it has no bytes."""
    kind = rng.randrange(9 if depth else 6)
    match kind:
        case 0 | 1:
            return rng.choice(NASTY_NUMBERS)
        case 2:
            return rng.choice(NASTY_TEXTS)
        case 3:
            return rng.choice((None, True, False))
        case 4:
            return rng.randbytes(rng.choice((0, 3, 12, 24))) if has_bytes else rng.choice(NASTY_TEXTS)
        case 5:
            return rng.getrandbits(rng.choice((4, 8, 16, 32, 63)))
        case 6 | 7:
            return [value(rng, depth - 1, has_bytes=has_bytes) for _ in range(rng.randrange(5))]
        case _:
            return {
                str(rng.choice(NASTY_TEXTS)): value(rng, depth - 1, has_bytes=has_bytes)
                for _ in range(rng.randrange(4))
            }


def changed_value(rng: random.Random, whole: Any, *, has_bytes: bool = True) -> Any:
    """A copy in which one place, however deep, has another value, is missing, or is there twice."""
    if isinstance(whole, dict) and whole and rng.random() < 0.9:
        name = rng.choice(list(whole))
        out = dict(whole)
        match rng.randrange(8):
            case 0:
                del out[name]
            case 1:
                out[str(rng.choice(NASTY_TEXTS))] = value(rng, has_bytes=has_bytes)
            case _:
                out[name] = changed_value(rng, whole[name], has_bytes=has_bytes)
        return out
    if isinstance(whole, list) and whole and rng.random() < 0.9:
        at = rng.randrange(len(whole))
        match rng.randrange(8):
            case 0:
                return whole[:at] + whole[at + 1 :]
            case 1:
                return [*whole[:at], whole[at], *whole[at:]]
            case _:
                return [*whole[:at], changed_value(rng, whole[at], has_bytes=has_bytes), *whole[at + 1 :]]
    return value(rng, has_bytes=has_bytes)


def nested(rng: random.Random, opening: bytes, closing: bytes = b"") -> bytes:
    """Brackets in brackets, deeper than any reader's stack."""
    depth = rng.choice((10, 100, 900, 990, 5000, 30000))
    return opening * depth + closing * rng.choice((0, depth))
