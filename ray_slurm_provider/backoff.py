"""How long node types wait after failed launches, and which hosts are avoided. Pure.

Times are seconds since the epoch, for several processes read them. A clock that is set back ends a wait.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from ray_slurm_provider.errors import LaunchDelayed, SubmitUnanswered

# The first failures may be one bad host; after them the wait doubles.
FAILURES_BEFORE_BACKOFF = 2
FIRST_WAIT_S = 10.0
LONGEST_WAIT_S = 600.0
QUEUE_LIMIT_RETRY_S = 15.0
HOST_FAILURES = 2
HOST_AVOIDED_S = 1800.0
# When one type fails on so many hosts, it is not the hosts.
_TOO_MANY_HOSTS = 3
# Categories of refusals: SLURM's own limit on queued jobs, which passes by itself, and jobs that it would never start.
LIMIT = "slurm-limit"
NEVER = "slurm-never"
UNANSWERED = SubmitUnanswered.launch_category


@dataclass
class TypeRecord:
    """Launches of one node type."""

    failures: int = 0  # rounds of launches in a row that failed
    until: float = 0.0  # nothing is submitted before
    paused: bool = False  # nothing is submitted until a person says so
    category: str = ""  # a word for why, of less than 20 characters
    reason: str = ""  # the last one
    log: list[str] = field(default_factory=list)  # the last lines of that job's
    hosts: list[str] = field(default_factory=list)  # SLURM nodes where they failed, the latest last
    counted: float = 0.0  # when the last round was


@dataclass
class HostRecord:
    """Starts on one SLURM node."""

    failures: int = 0  # starts in a row that failed
    until: float = 0.0  # it is avoided till then
    reason: str = ""  # the last one


@dataclass
class Backoff:
    """Everything that is known of failed launches in one cluster."""

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
        submitted_at: float | None = None,
        pause_after: int | None = None,
    ) -> None:
        """Note that a node of this type ended before Ray had settled on it.

        Those of one round, by `submitted_at`, count once. After `pause_after` failures in a row the type pauses.
        """
        record = self.types.setdefault(node_type, TypeRecord())
        record.reason, record.log = reason, list(log)
        if host:
            record.hosts = [*(known for known in record.hosts if known != host), host]
            self._host_failed(host, reason, now)
        if len(record.hosts) >= _TOO_MANY_HOSTS:
            for known in record.hosts:
                self.hosts.pop(known, None)
        if submitted_at is not None and submitted_at < record.counted:
            return
        record.failures += 1
        record.counted = now
        record.until = now + _wait_s(record.failures - FAILURES_BEFORE_BACKOFF)
        record.paused |= pause_after is not None and record.failures >= pause_after
        record.category = "slurm-paused" if record.paused else "slurm-backoff"

    def _host_failed(self, host: str, reason: str, now: float) -> None:
        record = self.hosts.setdefault(host, HostRecord())
        record.failures += 1
        record.reason = reason
        if record.failures >= HOST_FAILURES:
            record.until = now + HOST_AVOIDED_S

    def refused(self, node_type: str, reason: str, now: float, category: str) -> None:
        """Note that SLURM does not take jobs of this type, or will never start them; `LIMIT` is no failure."""
        record = self.types.setdefault(node_type, TypeRecord())
        record.reason, record.log, record.category = reason, [], category
        if category == LIMIT:
            record.until = now + QUEUE_LIMIT_RETRY_S
            return
        record.failures += 1
        record.counted = now
        record.until = now + _wait_s(record.failures)
        if category == NEVER:
            # Perhaps there is no node left but those that are avoided.
            self.hosts.clear()

    def succeeded(self, node_type: str, host: str) -> bool:
        """Forgive a type and a host of which a node came up; return whether there was something to forgive."""
        return (self.types.pop(node_type, None), self.hosts.pop(host, None)) != (None, None)

    def resume(self, node_type: str = "") -> list[str]:
        """Lift pauses and waits of a type, or of all, and of all hosts; return the names of both."""
        lifted = sorted(self.types) if not node_type else [node_type] * (node_type in self.types)
        for name in lifted:
            del self.types[name]
        avoided = sorted(host for host, record in self.hosts.items() if record.until)
        self.hosts.clear()
        return lifted + avoided

    def delay_reason(self, node_type: str, now: float) -> LaunchDelayed | None:
        """Return why nothing of this type is submitted now, None when nothing speaks against it."""
        record = self.types.get(node_type)
        if record is None:
            return None
        if record.paused:
            told = f"{record.failures} starts of type {node_type} in a row have failed"
            last = "\n  | ".join([record.reason, *record.log])
            return LaunchDelayed(record.category, f"{told}: it pauses until `ray-slurm resume`. The last one: {last}")
        left = record.until - now
        if not 0 < left <= LONGEST_WAIT_S:
            return None
        told = {
            "slurm-backoff": f"{record.failures} starts of type {node_type} in a row have failed",
            LIMIT: f"SLURM takes no more jobs of type {node_type} at present",
            UNANSWERED: f"sbatch does not say whether it takes jobs of type {node_type}",
            NEVER: f"SLURM would never start a job of type {node_type}",
        }.get(record.category, f"SLURM refuses jobs of type {node_type}")
        return LaunchDelayed(record.category, f"{told}; the next try is in {left:.0f} s. The last one: {record.reason}")

    def avoided(self, now: float) -> list[str]:
        return sorted(host for host, record in self.hosts.items() if 0 < record.until - now <= HOST_AVOIDED_S)

    def summary(self, now: float) -> list[str]:
        """Return for people which types are not launched now, and which hosts are avoided."""
        delays = [delay for node_type in sorted(self.types) if (delay := self.delay_reason(node_type, now))]
        avoided = [(host, self.hosts[host]) for host in self.avoided(now)]
        return [
            *map(str, delays),
            *(
                f"{host} is avoided for {(record.until - now) / 60:.0f} min: {record.failures} starts there in a row"
                f" have failed. The last one: {record.reason}"
                for host, record in avoided
            ),
        ]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def read_backoff(value: Any) -> Backoff:
    """Return what `Backoff.as_json` gave; nothing of what cannot be read."""
    given = value if isinstance(value, dict) else {}
    return Backoff(_records(TypeRecord, given.get("types")), _records(HostRecord, given.get("hosts")))


Record = TypeVar("Record", TypeRecord, HostRecord)


def _records(kind: type[Record], value: Any) -> dict[str, Record]:
    given = value if isinstance(value, dict) else {}
    return {str(name): _record(kind, entry) for name, entry in given.items() if isinstance(entry, dict)}


def _record(kind: type[Record], entry: dict[str, Any]) -> Record:
    """Return a record with those of its fields that have the right type."""
    empty = asdict(kind())
    return kind(**{name: entry[name] for name in empty.keys() & entry.keys() if _alike(entry[name], empty[name])})


def _alike(value: Any, example: Any) -> bool:
    if isinstance(example, list):
        return isinstance(value, list) and all(isinstance(line, str) for line in value)
    if isinstance(example, float):
        return type(value) in {int, float} and value == value  # noqa: PLR0124 not NaN
    return type(value) is type(example)


def _wait_s(step: int) -> float:
    """Return the wait after the n-th failure that counts."""
    return min(FIRST_WAIT_S * 2.0 ** min(step - 1, 16), LONGEST_WAIT_S) if step > 0 else 0.0
