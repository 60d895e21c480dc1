"""Keys as text: whatever is typed is either the very key or an error that names the place."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowspec_edge.core.cluster.key_text import API_PREFIX, KEY_BYTES, _expand, _polymod, format_key, parse_key
from flowspec_edge.errors import KeyTextError

SECRETS = st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES)
ZERO = format_key(bytes(KEY_BYTES))


@given(SECRETS)
def test_a_key_survives_being_read_aloud(secret: bytes) -> None:
    text = format_key(secret)
    assert parse_key(text) == secret
    assert parse_key(text.upper().replace("-", " ")) == secret
    assert parse_key("\n" + text.replace("-", "") + "\n") == secret


def test_the_checksum_is_that_of_bip_350() -> None:
    """``abcdef1l7aum6echk45nj3s0wdvt2fg8x9yrzpqzd3ryx`` is one of the test vectors of BIP 350."""
    alphabet = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
    data = [alphabet.index(letter) for letter in "l7aum6echk45nj3s0wdvt2fg8x9yrzpqzd3ryx"]
    assert _polymod([*_expand("abcdef"), *data]) == 0x2BC830A3


@given(SECRETS, st.integers(0, 37), st.sampled_from("qpzry9x8gf2tvdw0s3jn54khce6mua7l"))
def test_one_wrong_character_is_found_in_its_group(secret: bytes, place: int, letter: str) -> None:
    head, letters = "fsk1", format_key(secret).replace("-", "")[4:]
    if letters[place] == letter:
        return
    wrong = letters[:place] + letter + letters[place + 1 :]
    with pytest.raises(KeyTextError, match=f"mistyped, most likely in group {place // 4 + 1};") as error:
        parse_key(head + wrong)
    assert wrong not in str(error.value)


@given(SECRETS, st.integers(0, 36))
def test_two_swapped_characters_are_found(secret: bytes, place: int) -> None:
    letters = format_key(secret).replace("-", "")[4:]
    swapped = letters[:place] + letters[place + 1] + letters[place] + letters[place + 2 :]
    if swapped != letters:
        with pytest.raises(KeyTextError, match="mistyped"):
            parse_key("fsk1" + swapped)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "begins with fsk1-"),
        ("correct horse battery staple", "begins with fsk1-"),
        (ZERO[:-1], "37 characters behind fsk1 where 38 belong"),
        (ZERO + "q", "39 characters"),
        (ZERO.replace("q", "o", 1), "group 1 of the key has a 'o'"),
        (format_key(bytes(KEY_BYTES), API_PREFIX), "begins with fsk1-"),
    ],
)
def test_what_is_no_key_is_refused(text: str, why: str) -> None:
    with pytest.raises(KeyTextError, match=why):
        parse_key(text)
