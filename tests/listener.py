"""A socket to serve on."""

from __future__ import annotations

import socket


def make_listener(port: int = 0, host: str = "127.0.0.1") -> socket.socket:
    """Return a socket that listens on this machine, on a free port unless one is given.

    asyncio turns Nagle's algorithm off only for sockets that name their protocol, as those of `socket.create_server` do not:
    with it on, each response on a kept connection waits 40 ms for an acknowledgment.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    listener.listen()
    return listener
