"""The address and the ports of a Ray node."""

from __future__ import annotations

import fcntl
import ipaddress
import logging
import random
import socket
import struct
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

logger = logging.getLogger(__name__)

_SIOCGIFADDR = 0x8915  # netdevice(7)
_FIRST_PORT = 20000  # above Ray's default range for its workers
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
# From the block for documentation (RFC 5737): asking for a route to it sends nothing.
_SOMEWHERE = ("192.0.2.1", 9)


def choose_address(interface: str, slurm_node: str, node_address: Callable[[str], str]) -> str:
    """Return the address that Ray shall use on this host.

    The interface that the user named; else SLURM's own address of the node, which the other nodes can
    reach; else the host name's; else the one towards the default route. A loopback address is taken when
    SLURM's configuration holds one literally (then the whole cluster is on one host) or when there is no
    other; a name that resolves to 127.0.1.1 by /etc/hosts is a trap and is passed over.

    Args:
        interface: Name of the interface; "" for none.
        slurm_node: SLURM's name of this node; "" outside SLURM.
        node_address: Asks SLURM for the NodeAddr of a node.

    Raises:
        ValueError: The interface has no address.
    """
    if interface:
        return address_of_interface(interface)
    configured = node_address(slurm_node) if slurm_node else ""
    if _is_literal(configured) and is_local(configured):
        return configured
    candidates = [*_resolve(configured), *_resolve(socket.gethostname()), *_towards_default_route()]
    for address in candidates:
        if not is_loopback(address) and is_local(address):
            return address
    logger.warning("this host has only loopback addresses; Ray nodes on other hosts cannot reach it")
    return "127.0.0.1"


def address_of_interface(name: str) -> str:
    """Return the IPv4 address of an interface, or its global IPv6 address.

    Raises:
        ValueError: There is no such interface, or it has no address.
    """
    names = [interface for _, interface in socket.if_nameindex()]
    if name not in names:
        raise ValueError(f"interface {name!r} does not exist on {socket.gethostname()}; there are {', '.join(names)}")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            packed = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            return socket.inet_ntoa(packed[20:24])
        except OSError:
            pass
    for address in _ipv6_addresses(name):
        return address
    raise ValueError(f"interface {name!r} has no address on {socket.gethostname()}")


def is_loopback(address: str) -> bool:
    """Tell whether only this host can use the address."""
    return ipaddress.ip_address(address).is_loopback


def is_local(address: str) -> bool:
    """Tell whether the address is one of this host."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def free_ports(names: Iterable[str], address: str) -> dict[str, int]:
    """Return a free port for each name, all different, below the range that the kernel gives to clients.

    Raises:
        OSError: There are not enough.
    """
    wanted = list(names)
    last = _first_ephemeral_port()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    result: dict[str, int] = {}
    with ExitStack() as held:
        for port in random.sample(range(_FIRST_PORT, last), last - _FIRST_PORT):
            if len(result) == len(wanted):
                break
            probe = held.enter_context(socket.socket(family, socket.SOCK_STREAM))
            try:
                # Every address of the host: Ray's GCS listens on all of them.
                probe.bind(("", port))
            except OSError:
                continue
            result[wanted[len(result)]] = port
    if len(result) < len(wanted):
        raise OSError(f"there are no {len(wanted)} free ports between {_FIRST_PORT} and {last}")
    return result


def connection_state(host: str, port: int, timeout_s: float) -> str:
    """Return ``open``, ``refused`` (positively nobody there) or ``unknown`` for a TCP port."""
    try:
        with socket.create_connection((host, port), timeout=timeout_s):
            return "open"
    except ConnectionRefusedError:
        return "refused"
    except OSError:
        return "unknown"


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of ``1.2.3.4:6379`` or ``[::1]:6379``."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _first_ephemeral_port() -> int:
    try:
        first = int(_EPHEMERAL.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        first = 32768
    return first if first > _FIRST_PORT + 1000 else 65000


def _is_literal(address: str) -> bool:
    try:
        ipaddress.ip_address(address)
    except ValueError:
        return False
    return True


def _resolve(name: str) -> list[str]:
    if not name:
        return []
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in found))


def _towards_default_route() -> list[str]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_SOMEWHERE)
            return [str(probe.getsockname()[0])]
        except OSError:
            return []


def _ipv6_addresses(interface: str) -> list[str]:
    """Global addresses of an interface from /proc/net/if_inet6 (scope 00)."""
    try:
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
    except OSError:
        return []
    rows = [line.split() for line in lines]
    return [
        str(ipaddress.ip_address(int(row[0], 16).to_bytes(16, "big")))
        for row in rows
        if row[5] == interface and row[3] == "00"
    ]
