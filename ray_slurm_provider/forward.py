"""Forwards TCP ports of this host to the head, for ``ray dashboard`` and ``--port-forward``."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from typing_extensions import Self

_CHUNK_BYTES = 65536


@dataclass(frozen=True)
class Forward:
    """One port.

    Attributes:
        local: Port on the loopback address of this host.
        host: Where its connections go.
        remote: Port there.
    """

    local: int
    host: str
    remote: int


class Forwarder:
    """Forwards ports while it is open, in a thread of its own.

    Args:
        forwards: The ports.
    """

    def __init__(self, forwards: Sequence[Forward]) -> None:
        self._forwards = forwards
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="port-forward", daemon=True)

    def __enter__(self) -> Self:
        """Begin to listen.

        Raises:
            OSError: A local port is taken.
        """
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        except OSError:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening."""
        self.close()

    def close(self) -> None:
        """Stop listening and end the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _listen(self) -> None:
        for forward in self._forwards:
            await asyncio.start_server(_serve(forward), "127.0.0.1", forward.local)


def _serve(forward: Forward) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(forward.host, forward.remote)
        except OSError:
            writer.close()
            return
        await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))

    return serve


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(_CHUNK_BYTES):
            writer.write(data)
            await writer.drain()
    with contextlib.suppress(OSError):
        writer.close()
