"""Whether `ray up` will work, found out on the login node before a head is submitted.

Each check is a function that yields findings; one that cannot be made is a finding too. What only the compute nodes
know is asked by `canaries`.
"""

from __future__ import annotations

import resource
import shutil
import socket
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from ray_slurm_provider.agent import network, temp_dirs
from ray_slurm_provider.agent.allocation import MIB
from ray_slurm_provider.backends.launch_script import job_environment
from ray_slurm_provider.bootstrap import check_file_mounts, resolve_file
from ray_slurm_provider.canaries import look_around
from ray_slurm_provider.canary_findings import NodeTypeJob
from ray_slurm_provider.cluster import Cluster
from ray_slurm_provider.config import read_node_config, read_settings
from ray_slurm_provider.errors import SlurmError, SlurmProviderError
from ray_slurm_provider.file_sync import on_local_disk
from ray_slurm_provider.findings import FAILURE, FEW_FILES, OK, WARNING, Finding
from ray_slurm_provider.slurm.parse import OUT_OF_SERVICE, parse_time_s

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from ray_slurm_provider.config import NodeConfig, SlurmSettings
    from ray_slurm_provider.slurm.client import SlurmClient

_TOOLS = ("sbatch", "squeue", "scancel", "scontrol", "srun")
_LOCK_S = 5.0
_FREE_MIB = 200


@dataclass(frozen=True)
class Site:
    """What the checks look at.

    Attributes:
        path: The YAML.
        config: What Ray would make of it.
        cluster: The cluster that it describes.
        slurm: The way to SLURM.
        environ: The environment that a job would start with.
    """

    path: Path
    config: Mapping[str, Any]
    cluster: Cluster
    slurm: SlurmClient
    environ: Mapping[str, str]

    @property
    def settings(self) -> SlurmSettings:
        """Its ``provider.slurm``."""
        return self.cluster.settings

    def jobs(self) -> Iterator[tuple[str, NodeConfig]]:
        """Yield name and configuration of the node types that are jobs."""
        for name, entry in self.config["available_node_types"].items():
            node_config = read_node_config(entry["node_config"], f"available_node_types.{name}.node_config")
            if node_config.placement == "slurm":
                yield name, node_config


def preflight(path: Path, environ: Mapping[str, str], canary_wait_s: float | None = None) -> Iterator[Finding]:
    """Yield what every check of a YAML finds; the first failure of the basic ones ends it.

    Args:
        path: The YAML.
        environ: The environment of `ray up`.
        canary_wait_s: How long to wait for jobs that look around on the compute nodes, seconds; None for no jobs.
    """
    try:
        config = resolve_file(path)
        check_file_mounts(config)
    except SlurmProviderError as error:
        yield _failure("yaml", str(error))
        return
    cluster = Cluster(config["cluster_name"], read_settings(config["provider"]["slurm"]), environ)
    site = Site(path, config, cluster, cluster.slurm_client(), job_environment(environ))
    yield Finding("yaml", OK, f"{path} is valid; {len(config['available_node_types'])} node types")
    for basic in (_tools, _controller):
        findings = list(basic(site))
        yield from findings
        if any(finding.level == FAILURE for finding in findings):
            return
    for check in (_partitions, _submissions, _state_dir, _python, _address, _temp_dir, _programs, _limits):
        yield from _guarded(check, site)
    if canary_wait_s is not None:
        yield from _guarded(lambda site: _canaries(site, canary_wait_s), site, "canaries")


def _canaries(site: Site, wait_s: float) -> Iterator[Finding]:
    """Have jobs look around; those that sbatch refuses are told of already."""
    head = site.config["head_node_type"]
    kinds = [
        NodeTypeJob(name, node_config, is_head=name == head)
        for name, node_config in site.jobs()
        if _submission(site, name, node_config).level == OK
    ]
    if kinds:
        yield from look_around(site.settings, kinds, site.environ, wait_s)


def _guarded(check: Callable[[Site], Iterator[Finding]], site: Site, name: str = "") -> Iterator[Finding]:
    """Yield what a check finds; that it could not be made is a finding too."""
    try:
        yield from check(site)
    except (SlurmProviderError, OSError) as error:
        yield _failure(name or check.__name__.lstrip("_"), str(error))


def _tools(site: Site) -> Iterator[Finding]:
    missing = [tool for tool in _TOOLS if not _has_tool(site, tool)]
    if missing:
        yield _failure(
            "tools", f"{', '.join(missing)} not found", "install SLURM's client, or set provider.slurm.slurm_bin"
        )
    else:
        yield Finding("tools", OK, ", ".join(_TOOLS))


def _has_tool(site: Site, tool: str) -> bool:
    try:
        return bool(site.slurm.tools.path_of(tool))
    except SlurmError:
        return False


def _controller(site: Site) -> Iterator[Finding]:
    try:
        site.slurm.jobs()
    except SlurmError as error:
        if "munge" in str(error).lower():
            yield _failure("munge", str(error), "munged must run on this host, with the key of the cluster")
        else:
            yield _failure("controller", str(error), "is slurmctld up? try: scontrol ping")
    else:
        yield Finding("controller", OK, "slurmctld answers")


def _partitions(site: Site) -> Iterator[Finding]:
    partitions = site.slurm.partitions()
    nodes = site.slurm.nodes()
    default = [name for name, facts in partitions.items() if facts.get("Default") == "YES"]
    for name, node_config in site.jobs():
        options = node_config.sbatch.chosen()
        wanted = str(options["partition"]).split(",") if "partition" in options else default
        if not wanted:
            yield _failure(
                f"partition of {name}", "the site has no default partition", f"one of {', '.join(partitions)}"
            )
        for partition in wanted:
            facts = partitions.get(partition)
            if facts is None:
                yield _failure(f"partition of {name}", f"there is no partition {partition}", ", ".join(partitions))
                continue
            states = [node.get("State", "") for node in nodes if partition in node.get("Partitions", "").split(",")]
            yield from _partition(f"partition of {name}", facts, states, options)


def _partition(
    check: str, facts: Mapping[str, str], states: list[str], options: Mapping[str, Any]
) -> Iterator[Finding]:
    partition = facts["PartitionName"]
    longest = facts.get("MaxTime", "UNLIMITED")
    limit_s = parse_time_s(longest)
    time = options.get("time")
    if facts.get("State", "UP") != "UP":
        yield Finding(check, WARNING, f"{partition} is {facts['State']}", "jobs wait until the site brings it up")
    elif time and limit_s is not None and (parse_time_s(time) or limit_s + 1) > limit_s:
        yield _failure(
            check,
            f"time {time} is more than {partition} allows, {longest}: SLURM may take such a job, and it waits for ever",
            f"a time of at most {longest}",
        )
    elif all(OUT_OF_SERVICE.search(state) for state in states):
        text = f"none of the {len(states)} nodes of {partition} is in service ({', '.join(sorted(set(states)))})"
        yield Finding(check, WARNING, text, "jobs wait until the site brings one up; sinfo -R says why")
    else:
        yield Finding(check, OK, f"{partition}, up, at most {longest}")


def _submissions(site: Site) -> Iterator[Finding]:
    for name, node_config in site.jobs():
        yield _submission(site, name, node_config)


def _submission(site: Site, name: str, node_config: NodeConfig) -> Finding:
    text = site.cluster.preview(name, node_config, head=name == site.config["head_node_type"])
    try:
        return Finding(f"job of {name}", OK, site.slurm.test_submit(text, site.environ))
    except SlurmError as error:
        return _failure(
            f"job of {name}", f"sbatch refuses it: {error.complaint}", f"ray-slurm render {site.path} {name} shows it"
        )


def _state_dir(site: Site) -> Iterator[Finding]:
    directory = site.settings.directory()
    existed = directory.exists()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = directory / ".check.lock"
    try:
        with FileLock(lock, timeout=_LOCK_S):
            pass
    except (Timeout, OSError, NotImplementedError) as error:
        yield _failure(
            "state_dir", f"file locks do not work in {directory}: {error}", "another provider.slurm.state_dir"
        )
        return
    finally:
        lock.unlink(missing_ok=True)
        if not existed:
            with suppress(OSError):
                directory.rmdir()
    if _seen_by_this_host_only(site, directory):
        yield Finding(
            "state_dir",
            WARNING,
            f"{directory} looks like a file system of this host alone",
            "a directory that login and compute nodes share",
        )
    else:
        free_mib = shutil.disk_usage(_existing(directory)).free // MIB
        level = OK if free_mib >= _FREE_MIB else WARNING
        advice = "" if level == OK else "clear away what is not needed there, or another provider.slurm.state_dir"
        yield Finding("state_dir", level, f"{directory} can be written and locked; {free_mib} MiB are free", advice)


def _existing(directory: Path) -> Path:
    return next(place for place in (directory, *directory.parents) if place.exists())


def _seen_by_this_host_only(site: Site, directory: Path) -> bool:
    """Tell whether a directory is on a local disk while there are compute nodes elsewhere."""
    everything_here = all(network.is_local(address) for address in _addresses_of_nodes(site))
    return on_local_disk(directory) and not everything_here


def _addresses_of_nodes(site: Site) -> Iterator[str]:
    """Yield the addresses of the SLURM nodes; there may be thousands, and a look-up takes its time."""
    for name in dict.fromkeys(site.slurm.node_addresses()):
        with suppress(OSError):
            yield socket.gethostbyname(name)


def _python(site: Site) -> Iterator[Finding]:
    python = Path(site.settings.python or site.settings.default_python or "").expanduser()
    if not python.exists():
        yield _failure("python", f"{python} does not exist", "provider.slurm.python")
    elif _seen_by_this_host_only(site, python.parent):
        yield Finding(
            "python",
            WARNING,
            f"{python} looks like a file of this host alone",
            "an environment on the shared file system, or the same path on all hosts",
        )
    else:
        yield Finding("python", OK, str(python))


def _address(site: Site) -> Iterator[Finding]:
    on_login_node = "login_node" in {
        entry["node_config"].get("placement") for entry in site.config["available_node_types"].values()
    }
    if not on_login_node:
        yield Finding(
            "address",
            OK,
            f"each job takes that of interface {site.settings.interface}"
            if site.settings.interface
            else "each job takes that of its SLURM node",
        )
        return
    try:
        address = network.choose_login_address(site.settings.interface or "", site.slurm.node_addresses)
    except ValueError as error:
        yield _failure("address", str(error), "provider.slurm.interface")
        return
    if network.is_loopback(address) and any(not network.is_local(other) for other in _addresses_of_nodes(site)):
        yield _failure(
            "address",
            f"workers would be sent to {address}, which is this host only for itself",
            "provider.slurm.interface",
        )
    else:
        yield Finding("address", OK, f"workers connect to {address}")


def _temp_dir(site: Site) -> Iterator[Finding]:
    written = site.settings.temp_dir
    if "$" in written:
        yield Finding("temp_dir", OK, f"{written}, known when the job runs")
        return
    excess = temp_dirs.excess_length(str(Path(written).expanduser()))
    if excess > 0:
        yield _failure(
            "temp_dir", f"{written} is {excess} bytes too long for Unix sockets", "a shorter provider.slurm.temp_dir"
        )
    else:
        yield Finding("temp_dir", OK, written)


def _programs(site: Site) -> Iterator[Finding]:
    wanted = {"rsync": "ray rsync-up, ray submit and file_mounts need it"}
    if site.settings.command_runner == "ssh":
        wanted["ssh"] = "command_runner: ssh needs it"
    for program, why in wanted.items():
        found = shutil.which(program)
        if found:
            yield Finding(program, OK, found)
        else:
            yield Finding(program, WARNING if program == "rsync" else FAILURE, "not on PATH", why)
    if site.settings.tls and not find_spec("cryptography"):
        yield _failure("cryptography", "not in this Python", "pip install cryptography; tls: true needs it")
    elif site.settings.tls:
        yield Finding("cryptography", OK, "is installed")


def _limits(_: Site) -> Iterator[Finding]:
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < FEW_FILES:
        yield Finding("open files", WARNING, f"at most {soft} per process", f"ulimit -n {FEW_FILES} or more")
    else:
        yield Finding("open files", OK, f"at most {soft} per process")


def _failure(check: str, text: str, advice: str = "") -> Finding:
    return Finding(check, FAILURE, text, advice)
