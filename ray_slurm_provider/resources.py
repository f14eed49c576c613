"""What Ray resources a job's sbatch options promise. Pure functions."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ray_slurm_provider.agent.allocation import MIB, object_store_bytes
from ray_slurm_provider.errors import ConfigError
from ray_slurm_provider.sbatch_options import SbatchOptions
from ray_slurm_provider.slurm import parse

# A quarter of what Ray calls its minimum would not start; below this no object fits.
_LEAST_OBJECT_STORE_BYTES = 80 * MIB
# The login node is everybody's: no tasks there, and little memory, whatever the host has.
_LOGIN_NODE = {"CPU": 0, "memory": 1024 * MIB, "object_store_memory": 1024 * MIB}


def derive(options: SbatchOptions, accelerator_names: Iterable[str] = ()) -> dict[str, int]:
    """Return the Ray resources of a node with these options, memory in bytes when it is known beforehand."""
    cpus = options.cpus_per_task or 1
    gpus, gpu_type = gpu_request(options)
    if options.cpus_per_gpu and gpus and not options.cpus_per_task:
        cpus = options.cpus_per_gpu * gpus
    result = {"CPU": cpus}
    if gpus:
        result["GPU"] = gpus
        if gpu_type:
            result[f"accelerator_type:{accelerator_name(gpu_type, accelerator_names)}"] = 1
    total_mib = memory_mib(options, cpus, gpus)
    if total_mib:
        result.update(split_memory(total_mib))
    return result


def merge(written: Mapping[str, Any], options: SbatchOptions, derived: Mapping[str, int], path: str) -> dict[str, int]:
    """Return the resources with what a person wrote in place of what was derived.

    Raises:
        ConfigError: More is promised than the job will have: Ray would start such jobs without end.
    """
    _refuse_other_than_counts(written, path)
    _refuse_excess(written, options, derived, path)
    result = {**derived, **written}
    total = derived.get("memory", 0) + derived.get("object_store_memory", 0)
    if total and "memory" in written and "object_store_memory" not in written:
        result["object_store_memory"] = min(derived["object_store_memory"], total - written["memory"])
        if result["object_store_memory"] < _LEAST_OBJECT_STORE_BYTES:
            raise ConfigError(
                f"{path}.memory",
                f"{written['memory']} bytes leave no room for the object store in the job's {total} bytes",
                f"at most {total - _LEAST_OBJECT_STORE_BYTES}",
            )
    if total and "object_store_memory" in written and "memory" not in written:
        result["memory"] = total - written["object_store_memory"]
    return {name: int(value) for name, value in result.items()}


def on_login_node(written: Mapping[str, Any], path: str) -> dict[str, int]:
    """Return the resources of a head on the login node: next to nothing but what a person wrote."""
    _refuse_other_than_counts(written, path)
    return {**_LOGIN_NODE, **written}


def gpu_request(options: SbatchOptions) -> tuple[int, str]:
    for value in (options.gpus_per_node, options.gpus, options.gpus_per_task):
        if value is not None:
            return parse.parse_gpus(value)
    if options.gres:
        return parse.parse_gres(options.gres).get("gpu", (0, ""))
    return 0, ""


def memory_mib(options: SbatchOptions, cpus: int, gpus: int) -> int:
    if options.mem is not None:
        return parse.parse_mem_mib(options.mem)
    if options.mem_per_cpu is not None:
        return parse.parse_mem_mib(options.mem_per_cpu) * cpus
    if options.mem_per_gpu is not None:
        return parse.parse_mem_mib(options.mem_per_gpu) * gpus
    return 0


def split_memory(total_mib: int) -> dict[str, int]:
    """Share a job's memory between the object store and everything else, bytes."""
    store = object_store_bytes(total_mib)
    return {"memory": total_mib * MIB - store, "object_store_memory": store}


def accelerator_name(gres_type: str, known: Iterable[str]) -> str:
    """Return Ray's name for a gres type: ``a100`` and ``nvidia_a100_80gb`` are ``A100``.

    A name that Ray does not know is written in capitals.
    """
    words = re.split(r"[^a-z0-9]+", gres_type.lower())
    candidates = sorted(known, key=len, reverse=True)
    for name in candidates:
        if name.lower() == gres_type.lower():
            return name
    for name in candidates:
        if name.lower() in words:
            return name
    return gres_type.upper()


def _refuse_other_than_counts(written: Mapping[str, Any], path: str) -> None:
    for name, value in written.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigError(f"{path}.{name}", f"{value!r} is not a resource", "a whole number, memory in bytes")


def _refuse_excess(written: Mapping[str, int], options: SbatchOptions, derived: Mapping[str, int], path: str) -> None:
    if not options.exclusive and written.get("CPU", 0) > derived["CPU"]:
        raise ConfigError(
            f"{path}.CPU",
            f"{written['CPU']} contradicts the job, which has {derived['CPU']} CPUs by its sbatch options",
            f"at most {derived['CPU']}, or a larger node_config.sbatch.cpus_per_task",
        )
    if written.get("GPU", 0) > derived.get("GPU", 0):
        raise ConfigError(
            f"{path}.GPU",
            f"{written['GPU']} contradicts the job, which has {derived.get('GPU', 0)} GPUs by its sbatch options",
            f"at most {derived.get('GPU', 0)}, or a larger node_config.sbatch.gres",
        )
    total = derived.get("memory", 0) + derived.get("object_store_memory", 0)
    if not total:
        return
    wanted = written.get("memory", 0) + written.get("object_store_memory", 0)
    if wanted > total:
        key = "memory" if written.get("memory", 0) > total else "object_store_memory"
        key = key if key in written else "memory"
        raise ConfigError(
            f"{path}.{key}",
            f"{wanted} bytes of memory and object store contradict the job, which has {total} bytes",
            f"at most {total} together, or a larger node_config.sbatch.mem",
        )
