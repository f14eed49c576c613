"""The address of a Ray node."""

from __future__ import annotations

import fcntl
import ipaddress
import logging
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

logger = logging.getLogger(__name__)

_SIOCGIFADDR, _IFREQ_BYTES = 0x8915, 40  # netdevice(7)
# From the blocks for documentation (RFC 5737, RFC 3849): asking for a route to them sends nothing.
_SOMEWHERE = ("192.0.2.1", "2001:db8::1")
_DISCARD_PORT = 9
_RECEIVE_BYTES = 4096
# A host that is lost is noticed after 20 s.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 2))
_ENOUGH_NODES = 8


def choose_address(interface: str, slurm_node: str, node_address: Callable[[str], str]) -> str:
    """Return the address that Ray shall use on this host.

    The interface that the user named; else SLURM's own address of the node, which the other nodes can
    reach; else the host name's; else the one towards the default route. A loopback address is taken when
    SLURM's configuration holds one literally (then the whole cluster is on one host) or when there is no
    other; a name that resolves to 127.0.1.1 by /etc/hosts is a trap and is passed over.
    """
    if interface:
        return address_of_interface(interface)
    configured = node_address(slurm_node) if slurm_node else ""
    if _parsed(configured) is not None and is_local(configured):
        return configured
    return _first_usable(_resolve(configured))


def choose_login_address(interface: str, node_addresses: Callable[[], Iterable[str]]) -> str:
    """Return the address that a head on the login node shall use.

    The interface that the user named; else the address from which packets to the compute nodes go: a login
    node has a public side too. Loopback only when every compute node is on loopback.
    """
    if interface:
        return address_of_interface(interface)
    nodes = list(dict.fromkeys(node_addresses()))
    if nodes and all(map(is_loopback, nodes)):
        return "127.0.0.1"
    ways = [[own for address in _resolve(node) for own in _towards(address)] for node in nodes[:_ENOUGH_NODES]]
    found = [way[0] for way in ways if way]
    # The address of most; a node whose name resolves to something odd is outvoted.
    return _first_usable(sorted(dict.fromkeys(found), key=found.count, reverse=True))


def _first_usable(candidates: Iterable[str]) -> str:
    """Return the first of the candidates, the host name's addresses and the default route's that others can reach."""
    for address in (*candidates, *_resolve(socket.gethostname()), *_towards_default_route()):
        own = ipaddress.ip_address(address)
        if not own.is_loopback and not own.is_link_local and is_local(address):
            return address
    logger.warning("this host has only loopback addresses; Ray nodes on other hosts cannot reach it")
    return "127.0.0.1"


def address_of_interface(wanted: str) -> str:
    """Return the IPv4 address of an interface, or its global IPv6 address."""
    names = [interface for _, interface in socket.if_nameindex()]
    name = next((name for word in wanted.split(",") if (name := word.strip()) in names), None)
    if name is None:
        raise ValueError(f"interface {wanted!r} does not exist on {socket.gethostname()}; there are {', '.join(names)}")
    for address in (*_ipv4_address(name), *_ipv6_addresses(name)):
        return address
    raise ValueError(f"interface {name!r} has no address on {socket.gethostname()}")


def is_loopback(address: str) -> bool:
    """Tell whether this is an address that only this host can use; a name is none."""
    parsed = _parsed(address)
    return parsed is not None and parsed.is_loopback


def is_local(address: str) -> bool:
    """Tell whether the address is one of this host."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def connection_state(host: str, port: int, timeout_s: float) -> str:
    """Return ``open``, ``refused`` (positively nobody there) or ``unknown`` for a TCP port."""
    line = Line(host, port)
    try:
        return line.open(timeout_s)
    finally:
        line.close()


class Line:
    """A TCP connection that is held only to hear at once when the other end goes.

    Nothing is sent over it but what the kernel sends (SO_KEEPALIVE, tcp(7)), so that ten thousand of them cost nothing.
    """

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._socket: socket.socket | None = None

    def open(self, timeout_s: float) -> str:
        """Connect; return ``open``, ``refused`` (positively nobody there) or ``unknown``."""
        self.close()
        try:
            # Not `create_connection`: it loads the rules of international names, 1.6 ms, for a number.
            self._socket = socket.socket(socket.AF_INET6 if ":" in self._address[0] else socket.AF_INET)
            self._socket.settimeout(timeout_s)
            self._socket.connect(self._address)
        except (OSError, ValueError, TypeError, OverflowError) as error:  # all but the first for what is no address
            self.close()
            return "refused" if isinstance(error, ConnectionRefusedError) else "unknown"
        self._socket.setblocking(False)
        for option, value in _KEEPALIVE:
            self._socket.setsockopt(socket.IPPROTO_TCP, option, value)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return "open"

    def holds(self) -> bool:
        """Tell whether it is still connected; what the other end says is thrown away."""
        if self._socket is None:
            return False
        try:
            if self._socket.recv(_RECEIVE_BYTES):
                return True
        except BlockingIOError:
            return True
        except OSError:
            pass
        self.close()
        return False

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def own_addresses() -> list[str]:
    """Return every address of this host but the link-local ones."""
    names = [name for _, name in socket.if_nameindex()]
    found = [address for name in names for address in [*_ipv4_address(name), *_ipv6_addresses(name)]]
    return list(dict.fromkeys([*found, *_towards_default_route()]))


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of ``1.2.3.4:6379`` or ``[::1]:6379``."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(address)
    except ValueError:
        return None


def _resolve(name: str) -> list[str]:
    """Return the addresses of a host name, IPv4 first: the nodes of a cluster shall not differ in that."""
    if not name:
        return []
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    addresses = dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in found)
    return sorted(addresses, key=lambda address: ":" in address)


def _towards(address: str) -> list[str]:
    """Return the address of this host from which packets to another one would go; none without a route."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, _DISCARD_PORT))
            return [str(probe.getsockname()[0]).partition("%")[0]]
        except OSError:
            return []


def _towards_default_route() -> list[str]:
    return [own for somewhere in _SOMEWHERE for own in _towards(somewhere)]


def _ipv4_address(interface: str) -> list[str]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            packed = fcntl.ioctl(probe, _SIOCGIFADDR, os.fsencode(interface).ljust(_IFREQ_BYTES, b"\0"))
        except OSError:
            return []
    return [socket.inet_ntoa(packed[20:24])]


def _ipv6_addresses(interface: str) -> list[str]:
    """Global addresses of an interface from /proc/net/if_inet6 (scope 00)."""
    try:
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
    except OSError:
        return []
    rows = [line.split() for line in lines]
    return [
        socket.inet_ntop(socket.AF_INET6, bytes.fromhex(row[0]))
        for row in rows
        if row[5] == interface and row[3] == "00"
    ]
