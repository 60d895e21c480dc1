"""What is said to a client that speaks HTTP where TLS is spoken, so that it need not guess why it was hung up on."""

from __future__ import annotations

import contextlib
import socket

_BODY = (
    b'{"error": {"message": "this port speaks TLS; write https:// in the place of http://", '
    b'"type": "invalid_request_error", "param": null, "code": "tls_required"}}'
)
_ANSWER = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b"
    % (len(_BODY), _BODY)
)
_REQUEST_BYTES = 2**16
"""Of a request that has come: headers have 8 KiB, and few bodies more."""


def answer_plain_http(connection: socket.socket) -> bool:
    """Answer a connection that has begun with a request in plain HTTP. Returns False where it began otherwise.

    A method begins with a letter, and TLS with a number below 32.
    """
    with contextlib.suppress(OSError):
        if not connection.recv(1, socket.MSG_PEEK).isalpha():
            return False
        connection.recv(_REQUEST_BYTES)  # what is left unread would make the system take the answer back
        connection.send(_ANSWER)
        return True
    return False
