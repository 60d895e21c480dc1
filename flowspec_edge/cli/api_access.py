"""How clients of ``flowspec serve`` reach it, and what they have to be told for that: URL, key, and whom to trust."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flowspec_edge.core.cluster.address import Address
from flowspec_edge.errors import RequestError, plain_text
from flowspec_edge.net.addresses import is_loopback

if TYPE_CHECKING:
    import segno

    from flowspec_edge.net.certificates import ServingCertificate
    from flowspec_edge.web.guard import Guard

PLAIN_HTTP_WARNING = (
    "--plain-http: whoever listens on this network can read the API key, the prompts and the answers. "
    "Without it, clients check this server by its certificate."
)
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9._~\[\]:-]+")


@dataclass(frozen=True, slots=True)
class ApiAccess:
    """The address to listen on, who is let through, and the certificate where TLS is spoken.

    ``new_key`` is the first key where it was made just now. ``has_new_authority`` where clients that check certificates
    have to trust another one than before.
    """

    host: str
    guard: Guard
    certificate: ServingCertificate | None = None
    new_key: str | None = None
    has_new_authority: bool = False

    @property
    def scheme(self) -> str:
        return "http" if self.certificate is None else "https"


def open_api_access(
    host: str, *, is_insecure: bool, is_plain: bool, names: Sequence[str] = (), origins: Sequence[str] = ()
) -> ApiAccess:
    """Access for clients of an API that listens on ``host``. Beyond this machine they need a key, of which the first is
    made here where there is none, and speak TLS.

    ``names`` are names of this machine that it does not know itself. ``origins`` are those of pages that may use it.

    Raises:
        RequestError: one of these is none.
        StateError: a file of keys or certificates cannot be used.
    """
    from flowspec_edge.net.api_keys import FIRST_NAME, ApiKeyBook, add_api_key, load_api_keys
    from flowspec_edge.net.certificates import ServingCertificate, open_authority, own_names
    from flowspec_edge.web.guard import Guard

    own, pages = frozenset(own_names(names)), frozenset(_checked_origin(origin) for origin in origins)
    if is_insecure or is_loopback(host):
        return ApiAccess(host, Guard(hosts=own, origins=pages))
    new_key = None if load_api_keys() else add_api_key(FIRST_NAME)
    if is_plain:
        print(f"flowspec: {PLAIN_HTTP_WARNING}", file=sys.stderr)
        return ApiAccess(host, Guard(keys=ApiKeyBook(), origins=pages), new_key=new_key)
    authority = open_authority(host, [name.lower() for name in names])
    guard = Guard(keys=ApiKeyBook(), origins=pages, authority=authority.certificate)
    certificate = ServingCertificate(authority, host, own_names(names))
    return ApiAccess(host, guard, certificate, new_key, authority.is_new)


def api_url(access: ApiAccess, port: int) -> str:
    """The URL that clients are given: one that works, from other machines where they are let in."""
    from flowspec_edge.net.certificates import reachable_addresses

    host = reachable_addresses(access.host)[0]
    return f"{access.scheme}://{Address(host, port)}/v1"


def print_welcome(access: ApiAccess, url: str) -> None:
    """A code with the URL for phones, and what clients need that have not been told yet."""
    from flowspec_edge.net.certificates import authority_path

    if access.guard.keys is not None and sys.stdout.isatty():
        print_code(url)
    if access.new_key is not None:
        print(
            f"API key: {access.new_key}\nClients send it as `Authorization: Bearer`. It is shown this once; `flowspec "
            "key api add NAME` makes others.",
            flush=True,
        )
    if access.certificate is not None and (access.new_key is not None or access.has_new_authority):
        print(f"\n{trust_text(url, access.new_key or 'KEY', authority_path())}", flush=True)


def trust_text(url: str, key: str, authority: Path) -> str:
    """The very lines that make ordinary clients trust a server."""
    return f"""\
flowspec_edge.Client trusts this server by the key alone. Others need the file {authority}; copy it to
their machines (it is no secret), and name it there:

    curl --cacert {authority} -H 'Authorization: Bearer {key}' {url}/models
    SSL_CERT_FILE={authority} OPENAI_BASE_URL={url} OPENAI_API_KEY={key} python3 PROGRAM

or have everything on a machine trust it, but for browsers:

    sudo cp {authority} /usr/local/share/ca-certificates/flowspec.crt && sudo update-ca-certificates

and a browser: Settings, Privacy and security, Certificates, Authorities, Import; or for Chromium on Linux

    certutil -d sql:$HOME/.pki/nssdb -A -t C,, -n flowspec -i {authority}
"""


def print_code(text: str) -> None:
    """A QR code of that text, on the terminal."""
    _code_of(text).terminal(sys.stdout, compact=True)


def code_rows(text: str) -> list[str]:
    """A QR code of that text, without its border: for each row its modules, ``1`` where one is dark."""
    return ["".join(map(str, row)) for row in _code_of(text).matrix]


def _code_of(text: str) -> segno.QRCode:
    import segno

    return segno.make(text, error="m", micro=False)


def _checked_origin(origin: str) -> str:
    origin = origin.lower().removesuffix("/")
    if not _ORIGIN.fullmatch(origin):
        raise RequestError(
            f"--cors-origin {plain_text(origin[:80])} is no origin; give SCHEME://HOST or SCHEME://HOST:PORT, as a "
            "browser shows it"
        )
    return origin
