"""Ports for Ray: chosen here, passed explicitly, and kept from every other agent on the host.

Between the choice and Ray's own bind another node could take a port. So each agent holds, as long as it
lives, an abstract Unix socket (unix(7)) named after each of its ports: the kernel gives a name away once,
to whichever user, and takes it back when the agent dies, however it dies. Anybody can take such names, so those
of other users are respected only as long as there are other ports; what counts is whether somebody listens.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_FIRST_PORT = 20000  # above Ray's default range for its workers
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
LOWEST, HIGHEST = 1024, 65535


class Reservation:
    """Ports by name, ours until `release` or the end of this process.

    Attributes:
        ports: The ports.
    """

    def __init__(self) -> None:
        self.ports: dict[str, int] = {}
        self._names: list[socket.socket] = []

    def take(self, name: str, port: int, *, despite_strangers: bool = False) -> bool:
        """Reserve a port that nobody has, or of which only another user has the name; tell whether it worked."""
        held = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            held.bind(_name(port))
            held.listen()  # so that others can see whose it is
            ours = True
        except OSError:
            ours = despite_strangers and not _is_held_by_us(port)
        if not (ours and is_free(port)):
            held.close()
            return False
        self._names.append(held)
        self.ports[name] = port
        return True

    def release(self) -> None:
        for held in self._names:
            held.close()
        self._names.clear()
        self.ports = {}


def reserve(names: Iterable[str], within: str = "") -> Reservation:
    """Return a free port for each name.

    Args:
        names: What they are for.
        within: The range to choose from, ``20000-20999``; "" for one below those that the kernel gives to clients.

    Raises:
        OSError: The range has not enough free ports; the text says how many are needed.
    """
    wanted = list(names)
    candidates = port_range(within) if within else range(_FIRST_PORT, _first_ephemeral_port())
    reservation = Reservation()
    first = int.from_bytes(os.urandom(4), "big") % len(candidates)
    shuffled = [*candidates[first:], *candidates[:first]]
    for despite_strangers, port in itertools.product((False, True), shuffled):
        if len(reservation.ports) == len(wanted):
            break
        reservation.take(wanted[len(reservation.ports)], port, despite_strangers=despite_strangers)
    found = len(reservation.ports)
    if found < len(wanted):
        reservation.release()
        in_use = sum(not is_free(port) for port in candidates)
        raise OSError(
            f"of the ports {candidates.start}-{candidates.stop - 1} only {found} are free on {socket.gethostname()},"
            f" and a node of this kind needs {len(wanted)}: {', '.join(wanted)}; {in_use} are in use, and"
            f" {len(candidates) - found - in_use} reserved by other nodes of yours; see provider.slurm.ports.services"
        )
    return reservation


def port_range(text: str) -> range:
    """Return the ports of ``20000-20999``."""
    first, dash, last = text.partition("-")
    if not (dash and first.strip().isdigit() and last.strip().isdigit()):
        raise ValueError(f"must be a range of ports such as 20000-20999, not {text!r}")
    low, high = int(first), int(last)
    if not LOWEST <= low <= high <= HIGHEST:
        raise ValueError(f"must be a range between {LOWEST} and {HIGHEST}, the lower port first, not {text!r}")
    return range(low, high + 1)


def is_free(port: int) -> bool:
    """Tell whether nobody listens on a port, on any address of this host: Ray's GCS listens on all of them."""
    with contextlib.suppress(OSError), _wildcard_socket() as probe:
        # Connections that have just ended do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("", port))
        return True
    return False


def _name(port: int) -> str:
    return f"\0ray-slurm-port-{port}"


def _is_held_by_us(port: int) -> bool:
    """Tell whether a process of this user has the name of a port, by what the kernel says of who listens there."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(_name(port))
        except BlockingIOError:
            return True  # too many have asked already; whose it is cannot be seen
        _, user, _ = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        return bool(user == os.getuid())
    return False


def _wildcard_socket() -> socket.socket:
    try:
        probe = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
        probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    except OSError:
        return socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    return probe


def _first_ephemeral_port() -> int:
    try:
        first = int(_EPHEMERAL.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        first = 32768
    return first if first > _FIRST_PORT + 1000 else 65000
