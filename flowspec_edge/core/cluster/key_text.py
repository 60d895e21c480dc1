"""A 160-bit key as text that a person can type: bech32m (BIP 350) in groups of four.

The alphabet leaves out 1, b, i and o. The last six characters are a checksum that finds every way to mistype up to four
characters. So a typing error is reported at once, instead of making a node that nobody lets in.
"""

from __future__ import annotations

from flowspec_edge.errors import KeyTextError

KEY_BYTES = 20
"""160 random bits, which nobody can guess."""
CLUSTER_PREFIX, API_PREFIX = "fsk", "fsa"

_ALPHABET = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
_NUM_DATA = KEY_BYTES * 8 // 5
_NUM_CHECK = 6
_GROUP = 4
_GENERATORS = (0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)
_BECH32M = 0x2BC830A3


def format_key(secret: bytes, prefix: str = CLUSTER_PREFIX) -> str:
    """The text of a key of KEY_BYTES bytes: ``fsk1-``, nine groups of four and one of two.

    The last six characters are the checksum.
    """
    assert len(secret) == KEY_BYTES, "keys are made by us"
    number = int.from_bytes(secret, "big")
    data = [number >> 5 * place & 31 for place in reversed(range(_NUM_DATA))]
    remainder = _polymod([*_expand(prefix), *data, *[0] * _NUM_CHECK]) ^ _BECH32M
    data += [remainder >> 5 * place & 31 for place in reversed(range(_NUM_CHECK))]
    text = "".join(_ALPHABET[value] for value in data)
    return "-".join([f"{prefix}1", *(text[start : start + _GROUP] for start in range(0, len(text), _GROUP))])


def parse_key(text: str, prefix: str = CLUSTER_PREFIX) -> bytes:
    """Read a key. Case, spaces and hyphens do not matter.

    Raises:
        KeyTextError: the text is too short or too long, has a character that no key has, or is mistyped. The error says
            which group to look at, and never repeats the text.
    """
    plain = "".join(text.lower().split()).replace("-", "")
    if not plain.startswith(f"{prefix}1"):
        raise KeyTextError(f"this is not a key of the kind wanted here; one begins with {prefix}1-")
    letters = plain[len(prefix) + 1 :]
    wanted = _NUM_DATA + _NUM_CHECK
    if len(letters) != wanted:
        raise KeyTextError(
            f"the key has {len(letters)} characters behind {prefix}1 where {wanted} belong "
            f"({wanted // _GROUP} groups of {_GROUP} and one of {wanted % _GROUP}); copy all of it"
        )
    for place, letter in enumerate(letters):
        if letter not in _ALPHABET:
            raise KeyTextError(f"group {place // _GROUP + 1} of the key has a {letter!r}, which no key has; look again")
    data = [_ALPHABET.index(letter) for letter in letters]
    remainder = _polymod([*_expand(prefix), *data])
    if remainder != _BECH32M:
        group = _mistyped_group(data, remainder)
        where = "" if group is None else f", most likely in group {group}"
        raise KeyTextError(f"the key is mistyped{where}; compare it with the one shown by: flowspec key show")
    number = 0
    for value in data[:_NUM_DATA]:
        number = number << 5 | value
    return number.to_bytes(KEY_BYTES, "big")


def _mistyped_group(data: list[int], remainder: int) -> int | None:
    """The group, from 1 on, in which one other character would make the key right; None where more are wrong.

    The checksum is linear: a difference of ``value`` at ``place`` changes the remainder by ``value`` times a power of
    the generator that depends on the place alone.
    """
    for value in range(1, 32):
        effect = value
        for place in reversed(range(len(data))):
            if effect == remainder ^ _BECH32M:
                return place // _GROUP + 1
            effect = _times_x(effect)
    return None


def _expand(prefix: str) -> list[int]:
    return [ord(letter) >> 5 for letter in prefix] + [0] + [ord(letter) & 31 for letter in prefix]


def _polymod(values: list[int]) -> int:
    """The checksum polynomial of BIP 173 over GF(32)."""
    remainder = 1
    for value in values:
        remainder = _times_x(remainder) ^ value
    return remainder


def _times_x(remainder: int) -> int:
    top, remainder = remainder >> 25, (remainder & 0x1FFFFFF) << 5
    for place, generator in enumerate(_GENERATORS):
        if top >> place & 1:
            remainder ^= generator
    return remainder
