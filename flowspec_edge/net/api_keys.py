"""The keys of the HTTP API's clients, by name, in one file of mode 0600 that has their digests alone."""

from __future__ import annotations

import json
import os
import secrets
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from flowspec_edge.core.cluster.api_key import digest_of, mark_of
from flowspec_edge.core.cluster.key_text import API_PREFIX, KEY_BYTES, format_key, parse_key
from flowspec_edge.errors import ClusterKeyError, RequestError, StateError, is_plain
from flowspec_edge.files import read_private, state_directory, write_private

MAX_NAME_CHARACTERS = 64
FIRST_NAME = "first"
"""Of the key that a server makes where it needs one and there is none."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is kept of a key. ``added`` is a date, as 2026-11-30."""

    name: str
    digest: str
    added: str


def api_keys_path() -> Path:
    return state_directory() / "api-keys.json"


def load_api_keys() -> list[ApiKey]:
    """The keys that are kept on this machine, in the order in which they were added.

    Raises:
        StateError: the file cannot be read, others may read it, or it holds something else.
    """
    text = read_private(path := api_keys_path())
    if text is None:
        return []
    try:
        keys = [ApiKey(**entry) for entry in json.loads(text)]
        if not all(isinstance(value, str) for key in keys for value in asdict(key).values()):
            raise ValueError("a value is no text")
        for key in keys:
            bytes.fromhex(key.digest)
    except (ValueError, TypeError) as cause:
        raise StateError(
            f"{path} is no list of API keys; remove it, and add the keys anew: flowspec key api"
        ) from cause
    return keys


def add_api_key(name: str, key: str | None = None) -> str:
    """Keep a new key under a name, or a ``key`` that another server has made. Returns its text, which is kept nowhere.

    Raises:
        RequestError: the name is none, or is taken.
        KeyTextError: the key is mistyped.
        StateError: the file cannot be used.
    """
    if not 0 < len(name) <= MAX_NAME_CHARACTERS or not is_plain(name):
        raise RequestError(
            f"{name!r:.80} is no name for a key; give 1 to {MAX_NAME_CHARACTERS} characters, none of them a control "
            "character"
        )
    keys = load_api_keys()
    if any(known.name == name for known in keys):
        raise RequestError(f"there is a key {name!r} already; choose another name, or: flowspec key api revoke {name}")
    secret = secrets.token_bytes(KEY_BYTES) if key is None else parse_key(key, API_PREFIX)
    text = format_key(secret, API_PREFIX)
    _save([*keys, ApiKey(name, digest_of(text), time.strftime("%Y-%m-%d"))])
    return text


def revoke_api_key(name: str) -> None:
    """Forget a key; servers that run refuse it from the next request on.

    Raises:
        ClusterKeyError: there is none of that name.
        StateError: the file cannot be used.
    """
    keys = load_api_keys()
    left = [key for key in keys if key.name != name]
    if len(left) == len(keys):
        raise ClusterKeyError(f"there is no API key {name!r:.80}; flowspec key api list shows them")
    _save(left)


def _save(keys: list[ApiKey]) -> None:
    write_private(api_keys_path(), json.dumps([asdict(key) for key in keys], indent=1) + "\n")


class ApiKeyBook:
    """The keys that are kept on this machine, read again when their file has changed."""

    def __init__(self) -> None:
        self._seen: tuple[int, int] | None = None
        self._by_digest: dict[str, ApiKey] = {}

    def find(self, key: str) -> ApiKey | None:
        """The key with this text; None where it is none of those that are kept.

        Raises:
            StateError: the file cannot be used.
        """
        self._read()
        return self._by_digest.get(digest_of(key))

    def marked(self, mark: str) -> ApiKey | None:
        """The key that has this mark; see ``core/cluster/api_key.py``.

        Raises:
            StateError: the file cannot be used.
        """
        self._read()
        return next((key for key in self._by_digest.values() if mark_of(key.digest) == mark), None)

    def _read(self) -> None:
        try:
            status = os.stat(api_keys_path())
            seen = (status.st_mtime_ns, status.st_ino)
        except OSError:
            seen = None
        if seen is None or seen != self._seen:
            self._by_digest = {key.digest: key for key in load_api_keys()}
            self._seen = seen
