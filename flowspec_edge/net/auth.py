"""Authenticates the nodes of a cluster by its key: key -> scrypt -> Ed25519 seed -> the same certificate on every node.

Each side shows that certificate, requires it of the other side, and trusts no other. So whoever does not hold the key
is refused in the handshake, before any handler runs. Only TLS 1.3 is spoken, which hides the certificates as well. In
TLS 1.3 the connecting side finishes its handshake first, so a peer counts as joined only after its Welcome
(``link.py``).
"""

from __future__ import annotations

import datetime
import hashlib
import os
import secrets
import ssl
from dataclasses import dataclass
from pathlib import Path

from flowspec_edge.core.cluster.key_text import KEY_BYTES, format_key, parse_key
from flowspec_edge.errors import ClusterKeyError, KeyTextError
from flowspec_edge.files import read_private, state_directory, write_private

HANDSHAKE_S = 5.0
"""A socket that stays silent is closed after this time.

A handshake takes 2 ms on x86, and some 20 ms on the smallest board.
"""

_SCRYPT_N, _SCRYPT_R, _SCRYPT_P = 2**15, 8, 1
"""Takes 118 ms and 32 MiB on x86. It need not be slower, since the key has 160 random bits."""
_NAME = "flowspec cluster"
# A board without a battery-backed clock starts in 1970, and the certificate's dates must not keep it out.
_NOT_BEFORE = datetime.datetime(1950, 1, 1, tzinfo=datetime.UTC)
_NOT_AFTER = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What is derived from a key.

    ``fingerprint`` names the cluster in public and tells nothing about the key. ``server`` and ``client`` require the
    other side's certificate.
    """

    fingerprint: str
    certificate: bytes  # PEM
    server: ssl.SSLContext
    client: ssl.SSLContext


def derive_credentials(secret: bytes) -> Credentials:
    """Derive the credentials of a key, which are the same on every machine. Blocks for some 0.1 s."""
    seed, public = _stretch(secret)
    certificate, private_key = _certificate_of(seed)
    return Credentials(
        fingerprint=public.hex(),
        certificate=certificate,
        server=_context(ssl.PROTOCOL_TLS_SERVER, certificate, private_key),
        client=_context(ssl.PROTOCOL_TLS_CLIENT, certificate, private_key),
    )


def _stretch(secret: bytes) -> tuple[bytes, bytes]:
    """The seed of the private key, and the fingerprint. Raises KeyTextError for a key of another length."""
    if len(secret) != KEY_BYTES:
        raise KeyTextError(f"a key of {len(secret)} bytes; keys have {KEY_BYTES} (flowspec key new makes one)")
    stretched = hashlib.scrypt(
        secret, salt=f"{_NAME} 1".encode(), n=_SCRYPT_N, r=_SCRYPT_R, p=_SCRYPT_P, maxmem=2**26, dklen=40
    )
    return stretched[:32], stretched[32:]


def _certificate_of(seed: bytes) -> tuple[bytes, bytes]:
    """Certificate and private key as PEM.

    Ed25519 signatures are deterministic, so the same seed gives the same bytes.
    """
    # Only a node with a key needs this library, which a small board takes a while to load.
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.x509.oid import NameOID

    private_key = Ed25519PrivateKey.from_private_bytes(seed)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, _NAME)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(private_key.public_key())
        .serial_number(1)
        .not_valid_before(_NOT_BEFORE)
        .not_valid_after(_NOT_AFTER)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("flowspec")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(private_key, None)
    )
    return certificate.public_bytes(serialization.Encoding.PEM), private_key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _context(kind: int, certificate: bytes, private_key: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(kind)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # boards change their addresses; the certificate alone identifies a peer
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=certificate.decode())
    # The ssl module reads only files. This file has no name and is never on a disk.
    descriptor = os.memfd_create("flowspec certificate", os.MFD_CLOEXEC)
    with open(descriptor, "wb") as file:
        file.write(certificate + private_key)
        file.flush()
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    return context


def key_path() -> Path:
    """The file in which the cluster key is kept."""
    return state_directory() / "cluster.key"


def load_key() -> bytes | None:
    """Load the key that is kept on this machine; None where there is none.

    Raises:
        StateError: the file cannot be read, or other users may read it.
        ClusterKeyError: the file holds no key.
    """
    path = key_path()
    text = read_private(path)
    if text is None:
        return None
    try:
        return parse_key(text)
    except KeyTextError as cause:
        raise ClusterKeyError(f"{path}: {cause}; or make another one with: flowspec key new") from cause


def make_key() -> tuple[bytes, bool]:
    """Load the key that is kept on this machine, or make one where there is none.

    Returns the key, and whether it was made just now.

    Raises:
        StateError: the key cannot be written.
    """
    known = load_key()
    if known is not None:
        return known, False
    secret = secrets.token_bytes(KEY_BYTES)
    if write_private(key_path(), format_key(secret) + "\n", is_new=True):
        return secret, True
    made_meanwhile = load_key()
    assert made_meanwhile is not None, "the process that was faster has written a whole key"
    return made_meanwhile, False


def replace_key(secret: bytes | None = None) -> tuple[bytes, Path | None]:
    """Replace the key that is kept by ``secret``, or by a new key.

    Returns the key, and the file in which the previous one is kept, or None where there was no other.

    Raises:
        StateError: the key cannot be written.
    """
    path, kept = key_path(), None
    secret = secret or secrets.token_bytes(KEY_BYTES)
    text = format_key(secret) + "\n"
    before = read_private(path)
    if before is not None and before != text:
        kept = path.with_name(path.name + ".old")
        write_private(kept, before)
    write_private(path, text)
    return secret, kept
