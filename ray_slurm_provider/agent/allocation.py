"""What the allocation has: CPUs, GPUs and memory of the job, never of the host."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

logger = logging.getLogger(__name__)

MIB = 1024 * 1024
# Ray's own share and its cap (ray/_private/ray_constants.py, DEFAULT_OBJECT_STORE_MEMORY_PROPORTION
# and DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES).
OBJECT_STORE_SHARE = 0.3
OBJECT_STORE_MAX_BYTES = 200 * 10**9


class Allocation(NamedTuple):
    """What SLURM gave to this job on this host."""

    cpus: int  # CPUs
    gpus: int  # GPUs
    memory_mib: int  # memory in MiB

    def resources(self) -> dict[str, int]:
        """Return it in Ray's words, memory in bytes."""
        store = object_store_bytes(self.memory_mib)
        result = {"CPU": self.cpus, "memory": self.memory_mib * MIB - store, "object_store_memory": store}
        return {**result, "GPU": self.gpus} if self.gpus else result


def object_store_bytes(memory_mib: int) -> int:
    """Return how much of a job's memory is the object store's, bytes."""
    return min(int(memory_mib * MIB * OBJECT_STORE_SHARE), OBJECT_STORE_MAX_BYTES)


def read_allocation(environ: Mapping[str, str], job_facts: Callable[[], Mapping[str, str]]) -> Allocation:
    """Find out what this job has.

    Args:
        environ: The job's environment, with SLURM's variables (sbatch(1), OUTPUT ENVIRONMENT VARIABLES).
        job_facts: Asks ``scontrol show job``; called only when a variable is missing.
    """
    cpus = _number(environ.get("SLURM_CPUS_ON_NODE")) or _number(environ.get("SLURM_CPUS_PER_TASK")) or 1
    gpus = gpu_count(environ)
    memory = _memory_from_environment(environ, cpus, gpus)
    if not memory:
        memory = _memory_from_facts(job_facts())
    if not memory:
        memory = host_share_mib(cpus)
        logger.warning("SLURM does not say how much memory this job has; taking its share of the host, %d MiB", memory)
    return Allocation(cpus, gpus, memory)


def gpu_count(environ: Mapping[str, str]) -> int:
    """Return the number of GPUs by SLURM's variables.

    CUDA_VISIBLE_DEVICES comes last: sites write names, UUIDs and even NoDevFiles into it.
    """
    count = _number(environ.get("SLURM_GPUS_ON_NODE"))
    if count is not None:
        return count
    for name in ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS"):
        if environ.get(name):
            return len(_indices(environ[name]))
    visible = environ.get("CUDA_VISIBLE_DEVICES", "") if "SLURM_JOB_ID" in environ else ""
    return len([word for word in visible.split(",") if word and word != "NoDevFiles"])


def host_share_mib(cpus: int) -> int:
    """Return the memory of the host in the proportion of CPUs, MiB: for sites that do not track memory."""
    match = re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    total = int(match.group(1)) // 1024 if match else 1024
    return max(1, total * min(cpus, os.cpu_count() or 1) // (os.cpu_count() or 1))


def _memory_from_environment(environ: Mapping[str, str], cpus: int, gpus: int) -> int:
    per_node = _number(environ.get("SLURM_MEM_PER_NODE"))
    if per_node:
        return per_node
    per_cpu = _number(environ.get("SLURM_MEM_PER_CPU"))
    if per_cpu:
        return per_cpu * cpus
    return (_number(environ.get("SLURM_MEM_PER_GPU")) or 0) * gpus


def _memory_from_facts(facts: Mapping[str, str]) -> int:
    from ray_slurm_provider.slurm.parse import parse_mem_mib  # noqa: PLC0415 rarely needed, and every job starts here

    match = re.search(r"(?:^|,)mem=([\d.]+[KMGT]?)", facts.get("TRES", "") or facts.get("AllocTRES", ""))
    return parse_mem_mib(match.group(1)) if match else 0


def _number(text: str | None) -> int | None:
    match = re.match(r"\d+", text or "")
    return int(match.group()) if match else None


def _indices(text: str) -> list[str]:
    """Expand ``0-2,5``."""
    result: list[str] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if last.isdigit() and first.isdigit():
            result.extend(str(index) for index in range(int(first), int(last) + 1))
        else:
            result.append(part)
    return result
