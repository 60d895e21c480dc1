"""TLS for the HTTP API's clients: an authority of this machine's own, and certificates that it issues for the names and
addresses by which the machine is reached now.

Whoever trusts the authority trusts each certificate after it, so a server may get new addresses. The authority can
speak for local names, private addresses and the networks that it was made in alone (name constraints, RFC 5280,
4.2.1.10): a board's stolen file forges no site of the internet.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flowspec_edge.errors import StateError
from flowspec_edge.files import read_private, state_directory, write_private
from flowspec_edge.net.addresses import LOOPBACK, addresses_to_announce, is_loopback, local_networks

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
LOCAL_DOMAINS = ("localhost", "local", "lan", "home", "home.arpa", "internal", "fritz.box")
"""Names that home networks give to their hosts; beside them the authority may speak for this machine's own."""
LOCAL_NETWORKS: tuple[Network, ...] = tuple(
    map(
        ipaddress.ip_network,
        (
            *("127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", "100.64.0.0/10"),
            *("::1/128", "fc00::/7", "fe80::/10"),
        ),
    )
)
LEAF_DAYS = 397
"""Apple's systems take certificates of at most 398 days."""
_EARLIEST = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
"""A board without a battery-backed clock starts in 1970, and sets its clock later."""
_AUTHORITY_YEARS = 20


@dataclass(frozen=True, slots=True)
class Authority:
    """``certificate`` is PEM, for clients. It may speak for ``domains`` and what is within them, and for addresses of
    ``networks``. ``is_new`` where it was made just now.
    """

    certificate: str
    key: str
    domains: tuple[str, ...]
    networks: tuple[Network, ...]
    is_new: bool = False

    def may_speak_for(self, name: str) -> bool:
        """Whether it may, for a name or an address."""
        if (address := _address(name)) is not None:
            return any(address in network for network in self.networks)
        return any(name == domain or name.endswith(f".{domain}") for domain in self.domains)


def authority_path() -> Path:
    """The file that clients need to trust this machine's servers; it has no secret."""
    return state_directory() / "api-ca.pem"


def own_names(extra: Sequence[str] = ()) -> list[str]:
    """The names by which clients reach this machine, ``extra`` ones included."""
    host = socket.gethostname().lower()
    first = host.partition(".")[0]
    return list(dict.fromkeys(["localhost", host, f"{first}.local", first, *(name.lower() for name in extra)]))


def open_authority(host: str, extra: Sequence[str] = ()) -> Authority:
    """This machine's authority, for a server on ``host``. It is made where there is none, or where it may not speak for
    an address that the server has now, or for one of the ``extra`` names.

    Raises:
        StateError: its file cannot be used.
    """
    path = state_directory() / "api-ca.key"
    kept = read_private(path)
    if kept is not None:
        certificate = kept[kept.find("-----BEGIN CERTIFICATE-----") :]
        try:
            authority = Authority(certificate, kept.removesuffix(certificate), *_constraints_of(certificate))
        except ValueError as cause:
            raise StateError(f"{path} is no certificate authority of ours; remove it, and another is made") from cause
        if all(map(authority.may_speak_for, [*_addresses(host), *extra])):
            write_private(authority_path(), authority.certificate)
            return authority
        write_private(path.with_name(f"{path.name}.old"), kept)
    made = _make_authority(own_names([*extra, *_hosts(host)]), _networks(host))
    write_private(path, made.key + made.certificate)
    write_private(authority_path(), made.certificate)
    return made


class ServingCertificate:
    """The certificate of a server on ``host``, with its context for TLS; :meth:`renew` keeps it true."""

    def __init__(self, authority: Authority, host: str, names: Sequence[str]) -> None:
        self._authority, self._host, self._names = authority, host, list(names)
        self._issued: object = None
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.renew()

    def renew(self) -> None:
        """Issue another certificate where names, addresses or the day are others; new connections get it."""
        now = max(datetime.datetime.now(datetime.UTC), _EARLIEST)
        names = list(
            dict.fromkeys([*self._names, *_hosts(self._host), *sorted({*_addresses(self._host), LOOPBACK, "::1"})])
        )
        wanted = (names, now.date())
        if wanted == self._issued:
            return
        chain = _issue(self._authority, list(filter(self._authority.may_speak_for, names)), now)
        # The ssl module reads only files. This file has no name and is never on a disk.
        descriptor = os.memfd_create("flowspec certificate", os.MFD_CLOEXEC)
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(chain)
            file.flush()
            self.context.load_cert_chain(f"/proc/self/fd/{descriptor}")
        self._issued = wanted


def reachable_addresses(host: str) -> list[str]:
    """Where other machines reach a listener on ``host``: its name, or its addresses."""
    found = [address for address in _addresses(host) if not is_loopback(address)]
    return [*_hosts(host), *found] or [LOOPBACK]


def _hosts(host: str) -> list[str]:
    """The host to listen on where it is a name."""
    return [] if _address(host) is not None else [host.lower()]


def _addresses(host: str) -> list[str]:
    """The addresses of a listener on ``host``, where it is no name."""
    return [] if _hosts(host) else addresses_to_announce(host)


def _networks(host: str) -> list[Network]:
    """Those in which this machine has an address for a listener on ``host``, as far as they are not local anyway."""
    known = local_networks()
    found = [known.get(address) or ipaddress.ip_network(address) for address in _addresses(host)]
    return [network for network in found if not any(network.network_address in local for local in LOCAL_NETWORKS)]


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _make_authority(names: Sequence[str], networks: Sequence[Network]) -> Authority:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"flowspec on {socket.gethostname()}"[:64])])
    local = Authority("", "", LOCAL_DOMAINS, LOCAL_NETWORKS)
    domains = (*LOCAL_DOMAINS, *(name for name in names if not local.may_speak_for(name)))
    permitted: list[x509.GeneralName] = [x509.DNSName(domain) for domain in domains]
    permitted += [x509.IPAddress(network) for network in (*LOCAL_NETWORKS, *networks)]
    certificate = (
        _builder(name, name, private, private, days=365 * _AUTHORITY_YEARS, now=_EARLIEST)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.NameConstraints(permitted, None), critical=True)
    )
    return Authority(
        _signed(certificate, private), _private_pem(private), domains, (*LOCAL_NETWORKS, *networks), is_new=True
    )


def _issue(authority: Authority, names: Sequence[str], now: datetime.datetime) -> str:
    """A certificate for these names and addresses, with its private key and the authority's own certificate."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    issuer = x509.load_pem_x509_certificate(authority.certificate.encode())
    signing = load_pem_private_key(authority.key.encode(), None)
    assert isinstance(signing, ec.EllipticCurvePrivateKey), "it was made here"
    private = ec.generate_private_key(ec.SECP256R1())
    alternatives = [
        x509.DNSName(name) if (address := _address(name)) is None else x509.IPAddress(address) for name in names
    ]
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "flowspec serve")])
    certificate = (
        _builder(subject, issuer.subject, private, signing, days=LEAF_DAYS, now=now - datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    )
    return _private_pem(private) + _signed(certificate, signing) + authority.certificate


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    private: EllipticCurvePrivateKey,
    signing: EllipticCurvePrivateKey,
    *,
    days: int,
    now: datetime.datetime,
) -> x509.CertificateBuilder:
    from cryptography import x509

    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(private.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _signed(certificate: x509.CertificateBuilder, signing: EllipticCurvePrivateKey) -> str:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.sign(signing, SHA256()).public_bytes(Encoding.PEM).decode()


def _private_pem(private: EllipticCurvePrivateKey) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def _constraints_of(certificate: str) -> tuple[tuple[str, ...], tuple[Network, ...]]:
    """The domains and networks that an authority may speak for. Raises ValueError where it is none, or may for all."""
    from cryptography import x509

    try:
        found = x509.load_pem_x509_certificate(certificate.encode())
        permitted = found.extensions.get_extension_for_class(x509.NameConstraints).value.permitted_subtrees or []
    except x509.ExtensionNotFound as cause:
        raise ValueError("it may speak for any name") from cause
    networks = [name.value for name in permitted if isinstance(name, x509.IPAddress)]
    return (
        tuple(name.value for name in permitted if isinstance(name, x509.DNSName)),
        tuple(value for value in networks if isinstance(value, ipaddress.IPv4Network | ipaddress.IPv6Network)),
    )
