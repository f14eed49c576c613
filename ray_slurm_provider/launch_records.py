"""What is known of launches that failed: node types that wait or pause, hosts that are avoided.

Times are seconds since the epoch, for several processes read them. A clock that is set back ends a wait.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

from ray_slurm_provider.errors import LaunchDelayed

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# The first failures may be one bad host; after them the wait doubles.
FREE_FAILURES = 2
FIRST_WAIT_S = 10.0
LONGEST_WAIT_S = 600.0
# SLURM's own limit on the jobs in its queue was reached: that passes by itself.
NOT_NOW_S = 15.0
HOST_FAILURES = 2
HOST_AVOIDED_S = 1800.0
# When one type fails on so many hosts, it is not the hosts.
_TOO_MANY_HOSTS = 3


@dataclass
class TypeRecord:
    """Launches of one node type.

    Attributes:
        failures: Rounds of launches in a row that failed.
        until: Nothing is submitted before.
        paused: Whether nothing is submitted until a person says so.
        category: A word for why, of less than 20 characters.
        reason: The last reason.
        log: The last lines of that job's log.
        hosts: SLURM nodes where they failed, the latest last.
        counted: When the last round was counted.
    """

    failures: int = 0
    until: float = 0.0
    paused: bool = False
    category: str = ""
    reason: str = ""
    log: list[str] = field(default_factory=list)
    hosts: list[str] = field(default_factory=list)
    counted: float = 0.0


@dataclass
class HostRecord:
    """Starts on one SLURM node.

    Attributes:
        failures: Starts in a row that failed.
        until: It is avoided till then.
        reason: The last reason.
    """

    failures: int = 0
    until: float = 0.0
    reason: str = ""


@dataclass
class LaunchRecords:
    """Everything that is known of failed launches in one cluster.

    Attributes:
        types: By node type.
        hosts: By SLURM node.
    """

    types: dict[str, TypeRecord] = field(default_factory=dict)
    hosts: dict[str, HostRecord] = field(default_factory=dict)

    def failed(
        self,
        node_type: str,
        reason: str,
        now: float,
        *,
        host: str = "",
        log: Sequence[str] = (),
        born: float | None = None,
        pause_after: int | None = None,
    ) -> None:
        """Note that a node of this type ended before Ray had settled on it.

        Args:
            node_type: The type.
            reason: Why.
            now: The time.
            host: The SLURM node where it ran; "" when it never did.
            log: The last lines of its log.
            born: When it was submitted, None when that is not known; those of one round count once.
            pause_after: Failures in a row after which the type pauses; None for never.
        """
        record = self.types.setdefault(node_type, TypeRecord())
        record.reason, record.log = reason, list(log)
        if host:
            record.hosts = [*(known for known in record.hosts if known != host), host]
            self._host_failed(host, reason, now)
        if len(record.hosts) >= _TOO_MANY_HOSTS:
            for known in record.hosts:
                self.hosts.pop(known, None)
        if born is not None and born < record.counted:
            return
        record.failures += 1
        record.counted = now
        record.until = now + _wait(record.failures - FREE_FAILURES)
        record.paused = pause_after is not None and record.failures >= pause_after
        record.category = "slurm-paused" if record.paused else "slurm-backoff"

    def _host_failed(self, host: str, reason: str, now: float) -> None:
        record = self.hosts.setdefault(host, HostRecord())
        record.failures += 1
        record.reason = reason
        if record.failures >= HOST_FAILURES:
            record.until = now + HOST_AVOIDED_S

    def refused(self, node_type: str, reason: str, now: float, category: str) -> None:
        """Note that SLURM does not take jobs of this type as they are, or will never start them."""
        record = self.types.setdefault(node_type, TypeRecord())
        record.failures += 1
        record.reason, record.log, record.category = reason, [], category
        record.counted = now
        record.until = now + _wait(record.failures)

    def not_now(self, node_type: str, reason: str, now: float) -> None:
        """Note that SLURM takes no more jobs at present; no failure."""
        record = self.types.setdefault(node_type, TypeRecord())
        record.reason, record.log, record.category = reason, [], "slurm-limit"
        record.until = now + NOT_NOW_S

    def succeeded(self, node_type: str, host: str) -> bool:
        """Forgive a type and a host of which a node came up; tell whether there was something to forgive."""
        return (self.types.pop(node_type, None), self.hosts.pop(host, None)) != (None, None)

    def resume(self, node_type: str = "") -> list[str]:
        """Lift pauses and waits of a type, or of all, and of all hosts; return the names of both."""
        lifted = sorted(self.types) if not node_type else [node_type] * (node_type in self.types)
        for name in lifted:
            del self.types[name]
        avoided = sorted(host for host, record in self.hosts.items() if record.until)
        self.hosts.clear()
        return lifted + avoided

    def why_not_now(self, node_type: str, now: float) -> LaunchDelayed | None:
        """Return why nothing of this type is submitted now, None when nothing speaks against it."""
        record = self.types.get(node_type)
        if record is None:
            return None
        if record.paused:
            told = (
                f"{record.failures} starts of type {node_type} in a row have failed: it pauses until `ray-slurm resume`"
            )
            log = "".join(f"\n  | {line}" for line in record.log)
            return LaunchDelayed(record.category, f"{told}. The last one: {record.reason}{log}")
        left = record.until - now
        if not 0 < left <= LONGEST_WAIT_S:
            return None
        told = {
            "slurm-backoff": f"{record.failures} starts of type {node_type} in a row have failed",
            "slurm-limit": f"SLURM takes no more jobs of type {node_type} at present",
            "slurm-never": f"SLURM would never start a job of type {node_type}",
        }.get(record.category, f"SLURM refuses jobs of type {node_type}")
        return LaunchDelayed(record.category, f"{told}; the next try is in {left:.0f} s. The last one: {record.reason}")

    def avoided(self, now: float) -> list[str]:
        """Return the SLURM nodes on which nothing shall start now."""
        return sorted(host for host, record in self.hosts.items() if 0 < record.until - now <= HOST_AVOIDED_S)

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        return asdict(self)


def read_launch_records(value: Any) -> LaunchRecords:
    """Return what `LaunchRecords.as_json` gave; nothing of what cannot be read."""
    given = value if isinstance(value, dict) else {}
    return LaunchRecords(_records(TypeRecord, given.get("types")), _records(HostRecord, given.get("hosts")))


Record = TypeVar("Record", TypeRecord, HostRecord)


def _records(kind: type[Record], value: Any) -> dict[str, Record]:
    if not isinstance(value, dict):
        return {}
    return {str(name): _record(kind, entry) for name, entry in value.items() if isinstance(entry, dict)}


def _record(kind: type[Record], entry: dict[str, Any]) -> Record:
    """Return a record with those of its fields that have the right type."""
    empty = kind()
    right = {
        known.name: entry[known.name]
        for known in fields(kind)
        if known.name in entry and _alike(entry[known.name], getattr(empty, known.name))
    }
    return kind(**right)


def _alike(value: Any, example: Any) -> bool:
    if isinstance(example, list):
        return isinstance(value, list) and _all_text(value)
    if isinstance(example, float):
        return type(value) in {int, float} and value == value  # noqa: PLR0124 not NaN
    return type(value) is type(example)


def _all_text(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _wait(step: int) -> float:
    """Return the wait after the n-th failure that counts, seconds."""
    return min(FIRST_WAIT_S * 2.0 ** min(step - 1, 16), LONGEST_WAIT_S) if step > 0 else 0.0
