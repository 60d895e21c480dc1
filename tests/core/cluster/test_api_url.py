"""URLs of servers as people write them."""

import pytest

from flowspec_edge.core.cluster.api_url import read_api_url
from flowspec_edge.errors import PlainHttpError, RequestError


@pytest.mark.parametrize(
    ("text", "has_key", "url"),
    [
        ("pi-kitchen", False, "http://pi-kitchen:8008"),
        ("pi-kitchen", True, "https://pi-kitchen:8008"),
        ("192.168.1.20:9000", True, "https://192.168.1.20:9000"),
        ("[fe80::1]:9000/", False, "http://[fe80::1]:9000"),
        ("http://pi:8008/v1/", False, "http://pi:8008"),
        ("HTTPS://pi/v1", True, "https://pi"),
        (" http://127.0.0.1:8008 ", True, "http://127.0.0.1:8008"),
        ("http://localhost:8008", True, "http://localhost:8008"),
        ("proxy/flowspec/v1", False, "http://proxy:8008/flowspec"),
    ],
)
def test_what_people_write_becomes_what_paths_are_added_to(text: str, has_key: bool, url: str) -> None:
    assert read_api_url(text, has_key=has_key, allows_plain_http=False) == url


@pytest.mark.parametrize("text", ["", "http://", "ftp://pi", "a b", "pi:x", "http://[::1", "//pi"])
def test_what_is_no_url_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="is no URL of a server"):
        read_api_url(text, has_key=False, allows_plain_http=False)


def test_a_key_leaves_this_machine_unencrypted_only_where_somebody_said_so() -> None:
    with pytest.raises(PlainHttpError, match=r"http://pi:8008 unencrypted.*allows_plain_http=True"):
        read_api_url("http://pi:8008", has_key=True, allows_plain_http=False)
    assert read_api_url("http://pi:8008", has_key=True, allows_plain_http=True) == "http://pi:8008"
