"""Forwards TCP ports of this host to the head, for ``ray dashboard`` and ``--port-forward``."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

_CHUNK_BYTES = 65536


@dataclass(frozen=True)
class Forward:
    """One port."""

    local: int  # on the loopback address of this host
    host: str  # where its connections go
    remote: int


@contextmanager
def forwarded(forwards: Sequence[Forward]) -> Iterator[None]:
    """Forward ports meanwhile, in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="port-forward", daemon=True)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(_listen(forwards), loop).result()
        yield
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


async def _listen(forwards: Sequence[Forward]) -> None:
    for forward in forwards:
        await asyncio.start_server(partial(_serve, forward), "127.0.0.1", forward.local)


async def _serve(forward: Forward, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        far_reader, far_writer = await asyncio.open_connection(forward.host, forward.remote)
    except OSError:
        writer.close()
        return
    await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(_CHUNK_BYTES):
            writer.write(data)
            await writer.drain()
    with suppress(OSError):
        writer.close()
