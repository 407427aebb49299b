"""Run a command in a separate process, and wait for both the process and its pipes.

:mod:`asyncio` sets a process's return code while its pipes are still open, but its ``wait`` returns only after they are
closed. They stay open while a child of the process holds one, or while output is not read.
"""

from __future__ import annotations

import asyncio
import subprocess
from asyncio.subprocess import SubprocessStreamProtocol
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Final

_GRACE_S: Final = 5.0
_MAX_LINE_BYTES: Final = 64 * 1024
_NUM_STREAMS: Final = 3


class _Protocol(SubprocessStreamProtocol):
    """The library's streams, and a future that is done once the process has ended and its pipes are closed."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(limit=_MAX_LINE_BYTES, loop=loop)
        self.ended: asyncio.Future[None] = loop.create_future()
        self._open: set[int | str] = {"process"}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert isinstance(transport, asyncio.SubprocessTransport)  # noqa: S101  `subprocess_exec` passes no other
        self._open |= {number for number in range(_NUM_STREAMS) if transport.get_pipe_transport(number) is not None}

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        super().pipe_connection_lost(fd, exc)
        self._close(fd)

    def process_exited(self) -> None:
        super().process_exited()
        self._close("process")

    def _close(self, part: int | str) -> None:
        self._open.discard(part)
        if not self._open and not self.ended.done():
            self.ended.set_result(None)


class Child:
    """A process that runs a command; its standard output is discarded.

    Attributes:
        stdin: the stream to write to; ``None`` if the command reads nothing.
        stderr: its messages.
    """

    def __init__(self, transport: asyncio.SubprocessTransport, protocol: _Protocol) -> None:
        self._transport = transport
        self._protocol = protocol
        self.stdin = protocol.stdin
        assert protocol.stderr is not None  # noqa: S101  `start` requests it
        self.stderr = protocol.stderr

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self._transport.get_pid()

    @classmethod
    async def start(cls, command: Sequence[str], environ: Mapping[str, str], *, has_stdin: bool = False) -> Child:
        """Start a command.

        Raises:
            OSError: it cannot be started.
        """
        transport, protocol = await asyncio.get_running_loop().subprocess_exec(
            _Protocol,
            *command,
            stdin=subprocess.PIPE if has_stdin else subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environ,
        )
        return cls(transport, protocol)

    async def wait(self) -> int:
        """Wait until the process has ended and its pipes are closed; return its code."""
        await asyncio.shield(self._protocol.ended)
        code = self._transport.get_returncode()
        assert code is not None  # noqa: S101  it has ended
        return code

    async def end(self) -> None:
        """End the process, and close its pipes; kill it if it does not end."""
        if not self._protocol.ended.done():
            try:
                with suppress(ProcessLookupError):
                    self._transport.terminate()
                self._close_pipes()
                await asyncio.wait([self._protocol.ended], timeout=_GRACE_S)
            finally:  # also if this wait is canceled
                with suppress(ProcessLookupError):
                    self._transport.kill()
            await self.wait()

    def _close_pipes(self) -> None:
        for number in range(_NUM_STREAMS):
            if (pipe := self._transport.get_pipe_transport(number)) is not None:
                pipe.close()


def without_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of a process without the gateway's settings, which may be secrets."""
    return {name: value for name, value in environ.items() if not name.upper().startswith("GATEWAY_")}
