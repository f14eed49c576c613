"""SLURM's jobs as plain types, and what their states mean to us."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from typing import NamedTuple

logger = logging.getLogger(__name__)

_RANGE = re.compile(r"(\d+)(?:-(\d+)(?::(\d+))?)?")


class SlurmIdentity(NamedTuple):
    """Which SLURM answers, by its configuration."""

    name: str  # ClusterName
    controllers: tuple[str, ...]  # SlurmctldHost and SlurmctldPort of each host that may be in control

    def is_same(self, other: SlurmIdentity) -> bool:
        """Return whether two answers come from one SLURM; a site may add and remove hosts for its controller."""
        return self.name == other.name and not set(self.controllers).isdisjoint(other.controllers)

    def __str__(self) -> str:
        return f"SLURM cluster {self.name} ({', '.join(self.controllers)})"


class Meaning(Enum):
    """What a job state means for a Ray node."""

    QUEUED = "queued"  # it will run; nothing runs yet
    RUNNING = "running"  # it has its allocation
    ENDED = "ended"  # it will never run again under this id


class JobState(Enum):
    """Every base state of squeue(1), JOB STATE CODES, with its meaning.

    COMPLETING counts as ended: its processes are being killed, and Ray would wait for it for ever.
    A state that is not listed here counts as alive (`UNKNOWN`): unknown is not gone.
    """

    PENDING = ("PENDING", Meaning.QUEUED)
    REQUEUED = ("REQUEUED", Meaning.QUEUED)
    REQUEUE_FED = ("REQUEUE_FED", Meaning.QUEUED)
    REQUEUE_HOLD = ("REQUEUE_HOLD", Meaning.QUEUED)
    RESV_DEL_HOLD = ("RESV_DEL_HOLD", Meaning.QUEUED)
    SPECIAL_EXIT = ("SPECIAL_EXIT", Meaning.QUEUED)
    CONFIGURING = ("CONFIGURING", Meaning.QUEUED)
    RUNNING = ("RUNNING", Meaning.RUNNING)
    RESIZING = ("RESIZING", Meaning.RUNNING)
    SIGNALING = ("SIGNALING", Meaning.RUNNING)
    STAGE_OUT = ("STAGE_OUT", Meaning.RUNNING)
    STOPPED = ("STOPPED", Meaning.RUNNING)
    SUSPENDED = ("SUSPENDED", Meaning.RUNNING)
    UNKNOWN = ("UNKNOWN", Meaning.RUNNING)
    COMPLETING = ("COMPLETING", Meaning.ENDED)
    BOOT_FAIL = ("BOOT_FAIL", Meaning.ENDED)
    CANCELLED = ("CANCELLED", Meaning.ENDED)
    COMPLETED = ("COMPLETED", Meaning.ENDED)
    DEADLINE = ("DEADLINE", Meaning.ENDED)
    FAILED = ("FAILED", Meaning.ENDED)
    NODE_FAIL = ("NODE_FAIL", Meaning.ENDED)
    OUT_OF_MEMORY = ("OUT_OF_MEMORY", Meaning.ENDED)
    PREEMPTED = ("PREEMPTED", Meaning.ENDED)
    REVOKED = ("REVOKED", Meaning.ENDED)
    TIMEOUT = ("TIMEOUT", Meaning.ENDED)

    def __init__(self, label: str, meaning: Meaning) -> None:
        self.label = label
        self.meaning = meaning

    @classmethod
    def of(cls, word: str) -> JobState:
        """Return the state that squeue's ``%T`` names; `UNKNOWN` for a word that we never heard of."""
        state = _BY_LABEL.get(word)
        if state is None:
            if word not in _warned_about:
                _warned_about.add(word)
                logger.warning("squeue names the job state %r, which is new to us; such jobs count as alive", word)
            return cls.UNKNOWN
        return state


_BY_LABEL = {state.label: state for state in JobState}
_warned_about: set[str] = set()


class Job(NamedTuple):
    """One row of squeue; "" where it says nothing."""

    job_id: str  # 1234; 1234_5 for an element of an array, 1234_[0-7,9] for all that wait
    state: JobState
    reason: str = ""  # for waiting, or for the end
    partition: str = ""
    nodes: str = ""  # a host list
    time_limit: str = ""
    end: str = ""  # when it ends at the latest, or has ended
    start: str = ""  # or its estimate, while it waits
    name: str = ""
    comment: str = ""

    @property
    def alive(self) -> bool:
        return self.state.meaning is not Meaning.ENDED

    @property
    def queued(self) -> bool:
        return self.state.meaning is Meaning.QUEUED

    def elements(self) -> Iterable[Job]:
        """Return the jobs that this row stands for: one, or each element of an array.

        squeue's own ``--array`` leaves out the last element of one with a step, ``1234_[0-198:2]`` (measured, 22.05).
        """
        return self._each() if "[" in self.job_id else (self,)

    def _each(self) -> Iterator[Job]:
        number, _, indices = self.job_id.partition("_[")
        return (self._replace(job_id=f"{number}_{index}") for index in _indices(indices))


def element_ids(facts: Mapping[str, str]) -> list[str]:
    """Return the ids of the jobs that a record of ``scontrol show job`` is about."""
    if "ArrayTaskId" not in facts:
        return [facts["JobId"]]
    return [f"{facts['ArrayJobId']}_{index}" for index in _indices(facts["ArrayTaskId"])]


def _indices(text: str) -> Iterator[int]:
    """Read ``0-7,9`` and ``0-198:2%5``."""
    for first, last, step in _RANGE.findall(text.partition("%")[0]):
        yield from range(int(first), int(last or first) + 1, int(step or 0) or 1)


class JobEnd(NamedTuple):
    """How a job ended, from ``scontrol show job``."""

    state: str  # the state word: ``FAILED``, ``TIMEOUT``
    reason: str  # SLURM's reason; "" for none
    exit_code: int  # the script's exit code
    signal: int  # the signal that ended it, 0 for none

    def __str__(self) -> str:
        parts = [self.state]
        if self.reason:
            parts.append(f"reason {self.reason}")
        parts.append(f"signal {self.signal}" if self.signal else f"exit code {self.exit_code}")
        return ", ".join(parts)
