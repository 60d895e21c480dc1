"""``GET /``: a greeting for programs, and for browsers the page.

Its files come with the package as they are. They are read once, and tell no secret.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from aiohttp import web

from flowspec_edge.web.guard import PAGE_FILES

FOLDER = Path(__file__).parent / "page"
START = "index.html"
GREETING = "Ollama is running"
"""Clients of Ollama look for this text to see that there is one."""
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
"""What is not of this server is neither loaded nor asked, no text becomes a script or a part of the page's source, and
no other page shows this one in itself.
"""
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
    "Vary": "Accept",
}


def add_start(router: web.UrlDispatcher, *, has_page: bool) -> None:
    """Serve the start, and the page's files below ``/page/`` where it is to be there."""
    files = {path.name: _Served(path) for path in FOLDER.iterdir() if path.suffix in KINDS} if has_page else {}

    async def answer(request: web.Request) -> web.Response:
        is_browser = "text/html" in request.headers.get("Accept", "")
        return await files[START].answer(request) if is_browser and has_page else web.Response(text=GREETING)

    router.add_get("/", answer)
    for name, file in files.items():
        router.add_get(f"{PAGE_FILES}{name}", file.answer)


class _Served:
    """One file, which browsers ask for anew only where it has changed."""

    def __init__(self, path: Path) -> None:
        self._content = path.read_bytes()
        self._kind = KINDS[path.suffix]
        self._tag = hashlib.sha256(self._content).hexdigest()[:16]

    async def answer(self, request: web.Request) -> web.Response:
        is_known = any(tag.value == self._tag for tag in request.if_none_match or ())
        response = (
            web.Response(status=304, headers=HEADERS)
            if is_known
            else web.Response(body=self._content, content_type=self._kind, charset="utf-8", headers=HEADERS)
        )
        response.etag = self._tag
        return response
