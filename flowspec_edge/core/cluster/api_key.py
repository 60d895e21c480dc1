"""Keys of the HTTP API's clients: what a server keeps of one, and how it proves to the holder of one who it is.

A server keeps the digest of each key. With 160 random bits in a key, one SHA-256 is as good as a slow digest. A client
that connects for the first time trusts no certificate yet. It tells the ``mark`` of its key, and the server answers
with its certificate authority and a proof: an HMAC that only who knows the key or its digest can make. So no key is
sent before the client knows to whom, and no file has to be copied.
"""

from __future__ import annotations

import hashlib
import hmac

MAX_KEY_CHARACTERS = 200
"""Far more than any key has."""
_MARK_DIGITS = 16


def digest_of(key: str) -> str:
    """The digest of a key. Case, spaces and hyphens do not matter; a text that is no key has a digest of no key."""
    plain = "".join(key[:MAX_KEY_CHARACTERS].lower().split()).replace("-", "")
    return hashlib.sha256(f"flowspec api key {plain}".encode(errors="replace")).hexdigest()


def mark_of(digest: str) -> str:
    """What names a key in public, and tells nothing about it."""
    return hashlib.sha256(f"flowspec api mark {digest}".encode()).hexdigest()[:_MARK_DIGITS]


def proof_of(digest: str, authority: str) -> str:
    """What proves to the holder of the key that this certificate authority (PEM) is that of a server that knows it."""
    return hmac.new(bytes.fromhex(digest), authority.encode(), hashlib.sha256).hexdigest()


def is_proof(given: str, digest: str, authority: str) -> bool:
    """Whether a proof is right, in a time that does not tell where it is wrong."""
    return hmac.compare_digest(given.encode(errors="replace"), proof_of(digest, authority).encode())
