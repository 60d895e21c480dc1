"""Certificates that ordinary TLS clients take: by name and by address, from this machine's authority and no other."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from ipaddress import ip_network

import pytest
from aiohttp import web
from cryptography import x509

from flowspec_edge.errors import StateError
from flowspec_edge.files import state_directory
from flowspec_edge.net import certificates
from flowspec_edge.net.certificates import ServingCertificate, authority_path, open_authority, own_names
from flowspec_edge.net.server import serve_app


@contextlib.asynccontextmanager
async def serving(certificate: ServingCertificate) -> AsyncIterator[int]:
    served = await serve_app(web.Application(), tls=certificate.context, explains_tls=True)
    try:
        async with asyncio.timeout(10):
            yield served.port
    finally:
        await served.close()


async def shake_hands(port: int, name: str, authority: str) -> dict[str, object]:
    """The server's certificate, as a client that is strict about everything gets it."""
    context = ssl.create_default_context(cadata=authority)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=name)
    found = writer.get_extra_info("ssl_object").getpeercert()
    writer.close()
    with contextlib.suppress(ssl.SSLError, OSError):
        await writer.wait_closed()
    return dict(found)


async def test_strict_clients_take_it_by_every_name_and_address_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificates, "addresses_to_announce", lambda host: ["192.168.1.20", "192.0.2.20"])
    monkeypatch.setattr("socket.gethostname", lambda: "Pi-Kitchen")
    authority = open_authority("0.0.0.0", ["oven.example"])
    async with serving(ServingCertificate(authority, "0.0.0.0", own_names(["oven.example"]))) as port:
        for name in (
            "localhost",
            "pi-kitchen",
            "pi-kitchen.local",
            "oven.example",
            "127.0.0.1",
            "192.168.1.20",
            "192.0.2.20",
            "::1",
        ):
            await shake_hands(port, name, authority.certificate)
        for name in ("pi-attic.local", "192.168.1.21", "192.0.2.21", "example"):
            with pytest.raises(ssl.SSLCertVerificationError):
                await shake_hands(port, name, authority.certificate)
        other = certificates._make_authority(["x"], [])
        with pytest.raises(ssl.SSLCertVerificationError):
            await shake_hands(port, "localhost", other.certificate)


async def test_new_addresses_are_in_the_certificate_of_the_next_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = ["192.168.1.20"]
    monkeypatch.setattr(certificates, "addresses_to_announce", lambda host: addresses)
    authority = open_authority("127.0.0.1")
    certificate = ServingCertificate(authority, "0.0.0.0", own_names())
    async with serving(certificate) as port:
        first = await shake_hands(port, "192.168.1.20", authority.certificate)
        certificate.renew()
        assert (await shake_hands(port, "localhost", authority.certificate))["serialNumber"] == first["serialNumber"]
        addresses[:] = ["10.0.0.7"]
        certificate.renew()
        await shake_hands(port, "10.0.0.7", authority.certificate)
        with pytest.raises(ssl.SSLCertVerificationError):
            await shake_hands(port, "192.168.1.20", authority.certificate)


def test_the_authority_is_kept_and_may_not_speak_for_the_internet() -> None:
    first = open_authority("127.0.0.1")
    assert first.is_new
    again = open_authority("127.0.0.1")
    assert (again.is_new, again.certificate, again.key) == (False, first.certificate, first.key)
    assert authority_path().read_text() == first.certificate
    assert "PRIVATE" not in first.certificate
    assert (state_directory() / "api-ca.key").stat().st_mode & 0o777 == 0o600
    constraints = x509.load_pem_x509_certificate(first.certificate.encode()).extensions.get_extension_for_class(
        x509.NameConstraints
    )
    assert constraints.critical
    assert not first.may_speak_for("example.com") and first.may_speak_for("pi.lan")
    other = open_authority("127.0.0.1", ["pi.example.com"])
    assert other.is_new and other.may_speak_for("pi.example.com")
    assert (state_directory() / "api-ca.key.old").read_text().endswith(first.certificate)


async def test_a_stolen_authority_forges_no_site_of_the_internet(monkeypatch: pytest.MonkeyPatch) -> None:
    authority = open_authority("127.0.0.1")
    forged = certificates.Authority(authority.certificate, authority.key, ("com",), ())
    async with serving(ServingCertificate(forged, "127.0.0.1", ["bank.com"])) as port:
        with pytest.raises(ssl.SSLCertVerificationError, match="permitted subtree violation"):
            await shake_hands(port, "bank.com", authority.certificate)


def test_an_address_that_the_authority_may_not_speak_for_makes_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificates, "local_networks", lambda: {"192.0.2.20": ip_network("192.0.2.0/24")})
    addresses, seen = ["192.0.2.20"], set[str]()
    monkeypatch.setattr(certificates, "addresses_to_announce", lambda host: addresses)
    for address, is_new in (("192.0.2.20", True), ("192.0.2.21", False), ("10.0.0.1", False), ("198.51.100.1", True)):
        addresses[:] = [address]
        authority = open_authority("0.0.0.0")
        assert authority.is_new is is_new, address
        seen.add(authority.certificate)
    assert len(seen) == 2


def test_a_file_that_is_no_authority_is_named() -> None:
    open_authority("127.0.0.1")
    (state_directory() / "api-ca.key").write_text("x")
    with pytest.raises(StateError, match=r"api-ca\.key is no certificate authority"):
        open_authority("127.0.0.1")


async def test_http_where_tls_is_spoken_is_told_so_and_garbage_is_not() -> None:
    async with serving(ServingCertificate(open_authority("127.0.0.1"), "127.0.0.1", own_names())) as port:
        for sent, told in ((b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"use https"), (b"\x00\x01" * 8, b"")):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            with contextlib.suppress(ConnectionResetError):
                answer = await reader.read()
                assert (b"https://" in answer) is bool(told)
                assert answer.startswith(b"HTTP/1.1 400") is bool(told)
            writer.close()
