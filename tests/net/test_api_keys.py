"""Named keys of the API's clients: kept as digests, found by their text, gone when they are revoked."""

import json

import pytest

from flowspec_edge.core.cluster.api_key import digest_of, is_proof, mark_of, proof_of
from flowspec_edge.errors import ClusterKeyError, KeyTextError, RequestError, StateError
from flowspec_edge.net.api_keys import ApiKeyBook, add_api_key, api_keys_path, load_api_keys, revoke_api_key


def test_what_is_kept_does_not_tell_the_key_and_only_its_owner_reads_it() -> None:
    key = add_api_key("phone")
    assert key.startswith("fsa1-")
    text = api_keys_path().read_text()
    assert api_keys_path().stat().st_mode & 0o777 == 0o600
    assert key not in text and key.replace("-", "")[4:20] not in text
    ((name, digest),) = [(kept.name, kept.digest) for kept in load_api_keys()]
    assert (name, digest) == ("phone", digest_of(key))


def test_a_running_server_heeds_new_and_revoked_keys() -> None:
    book = ApiKeyBook()
    assert book.find("fsa1-x") is None
    keys = {name: add_api_key(name) for name in ("phone", "laptop")}
    assert {name: getattr(book.find(key), "name", None) for name, key in keys.items()} == {n: n for n in keys}
    assert getattr(book.marked(mark_of(digest_of(keys["phone"]))), "name", None) == "phone"
    revoke_api_key("phone")
    assert book.find(keys["phone"]) is None
    assert book.find(keys["laptop"]) is not None
    api_keys_path().unlink()
    assert book.find(keys["laptop"]) is None


def test_a_key_may_come_from_another_server_and_is_checked() -> None:
    key = add_api_key("phone")
    revoke_api_key("phone")
    assert add_api_key("phone", key.upper()) == key
    with pytest.raises(KeyTextError, match="mistyped"):
        add_api_key("laptop", key[:-1] + ("q" if key[-1] != "q" else "p"))


@pytest.mark.parametrize("name", ["", "x" * 65, "a\nb", "\x1b[31m"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(RequestError, match="is no name for a key"):
        add_api_key(name)


def test_a_name_is_given_once_and_revoked_once() -> None:
    add_api_key("phone")
    with pytest.raises(RequestError, match="flowspec key api revoke phone"):
        add_api_key("phone")
    revoke_api_key("phone")
    with pytest.raises(ClusterKeyError, match="flowspec key api list"):
        revoke_api_key("phone")


@pytest.mark.parametrize("text", ["{", "{}x", '[{"name": 1}]', '[{"name": "a", "digest": "zz", "added": ""}]', "5"])
def test_a_broken_file_is_named(text: str) -> None:
    add_api_key("phone")
    api_keys_path().write_text(text)
    with pytest.raises(StateError, match=r"api-keys\.json is no list of API keys"):
        load_api_keys()


def test_a_proof_is_of_one_key_and_one_authority() -> None:
    ours, theirs = digest_of("fsa1-aaaa"), digest_of("fsa1-bbbb")
    proof = proof_of(ours, "A")
    assert is_proof(proof, ours, "A")
    for digest, authority in ((theirs, "A"), (ours, "B")):
        assert not is_proof(proof, digest, authority)
    assert not is_proof("\ud800", ours, "A")
    assert len({ours, mark_of(ours), proof}) == 3
    json.dumps([ours, mark_of(ours), proof])
