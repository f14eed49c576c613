"""Ports: different, free, within the range, and nobody else's."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from ray_slurm_provider.agent import ports


def test_ports_are_different_and_free():
    found = ports.reserve(["a", "b", "c"]).ports
    assert len(set(found.values())) == 3
    for port in found.values():
        with socket.socket() as probe:
            probe.bind(("", port))


@pytest.fixture
def free_range():
    """Four ports in a row that nobody has."""
    for first in range(41000, 60000, 4):
        if all(ports.is_free(port) for port in range(first, first + 4)):
            return f"{first}-{first + 3}"
    raise AssertionError("no ports")


def test_a_port_is_given_away_once_until_it_is_released(free_range):
    first = ports.reserve("ab", free_range)
    second = ports.reserve("cd", free_range)
    assert not set(first.ports.values()) & set(second.ports.values())
    with pytest.raises(OSError, match=r"only 0 are free .* needs 1"):
        ports.reserve("e", free_range)
    first.release()
    assert ports.reserve("e", free_range).ports


def test_a_dead_process_gives_its_ports_back(free_range):
    code = f"from ray_slurm_provider.agent.ports import reserve; r = reserve('abcd', {free_range!r}); print(flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    with pytest.raises(OSError, match="only 0 are free"):
        ports.reserve("e", free_range)
    holder.kill()
    holder.wait()
    assert len(ports.reserve("abcd", free_range).ports) == 4


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.1.9", "::1"])
def test_a_port_with_a_listener_on_any_address_is_not_free(address, free_range):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as server:
        server.bind((address, int(free_range.split("-")[0])))
        server.listen()
        assert len(_all_of(free_range)) == 3


def _all_of(within):
    reservation = ports.Reservation()
    for port in ports.port_range(within):
        reservation.take(str(port), port)
    return reservation.ports


def test_too_many_for_the_range_is_an_error_that_counts(free_range):
    with pytest.raises(OSError, match=r"only 4 are free .* needs 5"):
        ports.reserve("abcde", free_range)


@pytest.mark.parametrize("text", ["", "1", "20000", "20000-", "b-c", "2000-1000", "80-90", "20000-70000"])
def test_what_is_no_range_is_refused(text):
    with pytest.raises(ValueError, match="range"):
        ports.port_range(text)


STRANGER = """
import os, socket, sys
os.setgid(65534); os.setuid(65534)
held = []
for port in range(*map(int, sys.argv[1:3])):
    held.append(socket.socket(socket.AF_UNIX))
    held[-1].bind(f"\\0ray-slurm-port-{port}")
    if sys.argv[3] == "listens":
        held[-1].listen()
print(flush=True)
sys.stdin.read()
"""


@pytest.fixture(params=["listens", "silent"])
def stranger(request, free_range):
    """Somebody else, who has the names of all ports of a range and no port."""
    if os.geteuid():
        pytest.skip("needs root")
    first, last = free_range.split("-")
    command = [sys.executable, "-c", STRANGER, first, str(int(last) + 1), request.param]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        yield holder
        holder.stdin.close()


def test_a_stranger_who_has_all_the_names_blocks_no_range(stranger, free_range):
    reservation = ports.reserve("abcd", free_range)
    assert len(set(reservation.ports.values())) == 4
    with pytest.raises(OSError, match="only 4 are free .* needs 5"):
        ports.reserve("abcde", free_range)


def test_ports_without_a_strangers_name_are_taken_first(stranger, free_range):
    low, high = (int(end) for end in free_range.split("-"))
    others = next(range(at, at + 4) for at in range(high + 1, 64000) if all(map(ports.is_free, range(at, at + 4))))
    found = ports.reserve("abcd", f"{low}-{others[-1]}").ports.values()
    assert not set(found) & set(range(low, high + 1))


def test_a_port_of_ours_stays_ours_however_many_have_asked_for_it(free_range):
    first = free_range.partition("-")[0]
    kept = ports.reserve("a", f"{first}-{first}")
    for _ in range(300):
        assert not ports.Reservation().take("b", int(first), despite_strangers=True)
    kept.release()


def test_it_is_told_what_has_the_ports(free_range):
    kept = ports.reserve("a", free_range)
    in_use = next(port for port in ports.port_range(free_range) if port not in kept.ports.values())
    with (
        socket.create_server(("127.0.0.1", in_use)),
        pytest.raises(OSError, match="1 are in use, and 1 reserved") as told,
    ):
        ports.reserve("bcd", free_range)
    assert f"of the ports {free_range} only 2 are free" in str(told.value)
    assert "provider.slurm.ports.services" in str(told.value)
