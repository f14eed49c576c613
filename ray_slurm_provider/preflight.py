"""Whether `ray up` will work, found out on the login node before a head is submitted.

Each check is a function that yields findings; one that cannot be made is a finding too. What only the compute nodes
know is asked by `canaries`; what any host says of itself, by `agent/host_checks`.
"""

import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from ray_slurm_provider.agent import host_checks, network, temp_dirs
from ray_slurm_provider.agent.allocation import MIB
from ray_slurm_provider.backends.launch_script import job_environment
from ray_slurm_provider.bootstrap import check_for_up, resolve_file
from ray_slurm_provider.canaries import Address, NodeType, look_around
from ray_slurm_provider.cluster import Cluster
from ray_slurm_provider.config import SlurmSettings, read_node_config, read_settings
from ray_slurm_provider.errors import SlurmError, SlurmProviderError, StateError
from ray_slurm_provider.file_sync import on_local_disk
from ray_slurm_provider.findings import FAILURE, OK, WARNING, Finding
from ray_slurm_provider.locks import locked
from ray_slurm_provider.slurm.client import SlurmClient
from ray_slurm_provider.slurm.parse import OUT_OF_SERVICE, parse_time_s

_TOOLS = ("sbatch", "squeue", "scancel", "scontrol", "srun")
_LOCK_S = 5.0
_ENOUGH_MIB = 200


@dataclass
class Site:
    """What the checks look at, and what later ones need of earlier ones."""

    path: Path  # the YAML
    settings: SlurmSettings
    jobs: list[NodeType]
    login_head: NodeType | None  # the head, when it is a process on this host
    cluster: Cluster
    slurm: SlurmClient
    environ: Mapping[str, str]  # what a job would start with
    probe_wait_s: float | None  # how long to wait for probe jobs, seconds; None for no jobs
    accepted: list[NodeType] = field(default_factory=list)  # those that sbatch would take
    login: Address | None = None  # where this host listens as a head would

    def nodes_are_here(self) -> bool:
        """Tell whether every SLURM node is this host; there may be thousands, and a look-up takes its time."""
        for name in dict.fromkeys(self.slurm.node_addresses()):
            with suppress(OSError):
                if not network.is_local(socket.gethostbyname(name)):
                    return False
        return True


def preflight(path: Path, environ: Mapping[str, str], probe_wait_s: float | None = None) -> Iterator[Finding]:
    """Yield what every check of a YAML finds, in the environment of `ray up`; probe jobs only with a time to wait."""
    try:
        config = resolve_file(path)
        check_for_up(config)
    except SlurmProviderError as error:
        yield Finding("yaml", FAILURE, str(error))
        return
    types = [
        NodeType(name, read_node_config(entry["node_config"], name), name == config["head_node_type"])
        for name, entry in config["available_node_types"].items()
    ]
    yield Finding("yaml", OK, f"{path} is valid; {len(types)} node types")
    jobs = [kind for kind in types if kind.config.placement == "slurm"]
    login_head = next((kind for kind in types if kind.config.placement == "login_node"), None)
    settings = read_settings(config["provider"]["slurm"])
    cluster = Cluster(config["cluster_name"], settings, environ)
    slurm, job_environ = cluster.slurm_client(), job_environment(environ)
    site = Site(path, settings, jobs, login_head, cluster, slurm, job_environ, probe_wait_s)
    with _state_dir_left_as_it_is(settings.directory()):
        for check in _CHECKS:
            for finding in _guarded(check, site):
                yield finding
                if finding.level == FAILURE and finding.check in _NEEDED_BY_OTHERS:
                    return


@contextmanager
def _state_dir_left_as_it_is(directory: Path) -> Iterator[None]:
    existed = directory.exists()
    try:
        yield
    finally:
        if not existed:
            with suppress(OSError):
                directory.rmdir()


def _guarded(check: Callable[[Site], Iterator[Finding]], site: Site) -> Iterator[Finding]:
    """Yield what a check finds; that it could not be made is a finding too."""
    try:
        yield from check(site)
    except (SlurmProviderError, OSError, NotImplementedError) as error:  # the last where there are no locks
        yield Finding(check.__name__.strip("_"), FAILURE, str(error))


def _tools(site: Site) -> Iterator[Finding]:
    missing = [tool for tool in _TOOLS if not shutil.which(tool, path=site.settings.slurm_bin)]
    if missing:
        advice = "install SLURM's client, or set provider.slurm.slurm_bin"
        yield Finding("tools", FAILURE, f"{', '.join(missing)} not found", advice)
    else:
        yield Finding("tools", OK, ", ".join(_TOOLS))


def _controller(site: Site) -> Iterator[Finding]:
    try:
        site.slurm.jobs()
        yield Finding("controller", OK, "slurmctld answers")
    except SlurmError as error:
        if "munge" in str(error).lower():
            yield Finding("munge", FAILURE, str(error), "munged must run on this host, with the key of the cluster")
        else:
            yield Finding("controller", FAILURE, str(error), "is slurmctld up? try: scontrol ping")


def _federation(site: Site) -> Iterator[Finding]:
    name = site.slurm.federation()
    if name:
        text = f"the federation {name} may start jobs on another of its clusters, where nothing is seen of them"
        advice = "keep jobs on this cluster, by --cluster-constraint in provider.slurm.sbatch_extra, or ask the site"
        yield Finding("federation", WARNING, text, advice)


def _partitions(site: Site) -> Iterator[Finding]:
    partitions = site.slurm.partitions()
    nodes = site.slurm.nodes()
    default = [name for name, facts in partitions.items() if facts.get("Default") == "YES"]
    for kind in site.jobs:
        check = f"partition of {kind.name}"
        options = kind.config.sbatch.chosen()
        wanted = str(options["partition"]).split(",") if "partition" in options else default
        if not wanted:
            yield Finding(check, FAILURE, "the site has no default partition", f"one of {', '.join(partitions)}")
        for name in wanted:
            if name not in partitions:
                yield Finding(check, FAILURE, f"there is no partition {name}", ", ".join(partitions))
                continue
            states = [node.get("State", "") for node in nodes if name in node.get("Partitions", "").split(",")]
            yield _partition(check, partitions[name], states, kind.config.sbatch.time)


def _partition(check: str, facts: Mapping[str, str], states: list[str], time: str | None) -> Finding:
    name, longest = facts["PartitionName"], facts.get("MaxTime", "UNLIMITED")
    limit_s = parse_time_s(longest)
    if facts.get("State", "UP") != "UP":
        return Finding(check, WARNING, f"{name} is {facts['State']}", "jobs wait until the site brings it up")
    if time and limit_s is not None and (parse_time_s(time) or limit_s + 1) > limit_s:
        text = f"time {time} is more than {name} allows, {longest}: SLURM may take such a job, and it waits for ever"
        return Finding(check, FAILURE, text, f"a time of at most {longest}")
    if all(OUT_OF_SERVICE.search(state) for state in states):
        text = f"none of the {len(states)} nodes of {name} is in service ({', '.join(sorted(set(states)))})"
        return Finding(check, WARNING, text, "jobs wait until the site brings one up; sinfo -R says why")
    return Finding(check, OK, f"{name}, up, at most {longest}")


def _submissions(site: Site) -> Iterator[Finding]:
    for kind in site.jobs:
        text = site.cluster.preview(kind.name, kind.config, head=kind.is_head)
        try:
            finding = Finding(f"job of {kind.name}", OK, site.slurm.test_submit(text, site.environ))
            site.accepted.append(kind)
        except SlurmError as error:
            advice = f"ray-slurm render {site.path} {kind.name} shows it"
            finding = Finding(f"job of {kind.name}", FAILURE, f"sbatch refuses it: {error.complaint}", advice)
        yield finding


def _state_dir(site: Site) -> Iterator[Finding]:
    directory = site.settings.directory()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = directory / ".check.lock"
    try:
        with locked(lock, _LOCK_S):
            free_mib = shutil.disk_usage(directory).free // MIB
    except (StateError, OSError) as error:
        text, _, advice = str(error).partition("\n")
        yield Finding("state_dir", FAILURE, text, advice.strip() or "another provider.slurm.state_dir")
        return
    finally:
        lock.unlink(missing_ok=True)
    if on_local_disk(directory) and not site.nodes_are_here():
        text = f"{directory} looks like a file system of this host alone"
        yield Finding("state_dir", WARNING, text, "a directory that login and compute nodes share")
        return
    text = f"{directory} can be written and locked; {free_mib} MiB are free"
    if free_mib >= _ENOUGH_MIB:
        yield Finding("state_dir", OK, text)
    else:
        advice = "clear away what is not needed there, or another provider.slurm.state_dir"
        yield Finding("state_dir", WARNING, text, advice)


def _python(site: Site) -> Iterator[Finding]:
    python = Path(site.settings.python or site.settings.default_python or "").expanduser()
    if not python.exists():
        yield Finding("python", FAILURE, f"{python} does not exist", "provider.slurm.python")
    elif on_local_disk(python.parent) and not site.nodes_are_here():
        advice = "an environment on the shared file system, or the same path on all hosts"
        yield Finding("python", WARNING, f"{python} looks like a file of this host alone", advice)
    else:
        yield Finding("python", OK, str(python))


def _address(site: Site) -> Iterator[Finding]:
    interface = site.settings.interface
    if site.login_head is None:
        owner = f"interface {interface}" if interface else "its SLURM node"
        yield Finding("address", OK, f"each job takes that of {owner}")
        return
    address, port, finding = host_checks.listen_as_ray(
        lambda: network.choose_login_address(interface or "", site.slurm.node_addresses),
        site.settings.ports.services or "",
        one_host=site.nodes_are_here(),
    )
    site.login = (address, port) if port else None
    yield finding


def _host(site: Site) -> Iterator[Finding]:
    """Look at this host as far as nodes of Ray depend on it."""
    base, head = site.settings.temp_dir, site.login_head
    if head is not None:
        resources = head.config.resolved.resources if head.config.resolved is not None else {}
        yield from host_checks.check_host(base, resources)
        return
    excess = 0 if "$" in base else temp_dirs.excess_length(str(Path(base).expanduser()))
    if excess > 0:
        text = f"{base} is {excess} bytes too long for Unix sockets"
        yield Finding("temp_dir", FAILURE, text, "a shorter provider.slurm.temp_dir")
    else:
        yield Finding("temp_dir", OK, f"{base} where jobs run")
    yield host_checks.check_open_files()


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
        yield Finding("cryptography", FAILURE, "not in this Python", "pip install cryptography; tls: true needs it")
    elif site.settings.tls:
        yield Finding("cryptography", OK, "is installed")


def _config_cache(_: Site) -> Iterator[Finding]:
    """Warn of a cached YAML that somebody else has written: Ray imports what it names, before we are asked."""
    for path in Path(tempfile.gettempdir()).glob("ray-config-*"):
        with suppress(FileNotFoundError):
            if path.lstat().st_uid != os.getuid():
                text = f"{path} is another user's: when it is made for this YAML, `ray down` runs what it names"
                yield Finding(
                    "TMPDIR", WARNING, text, "mkdir -p -m 700 ~/.cache/ray-slurm; export TMPDIR=~/.cache/ray-slurm"
                )
                return


def _probe_jobs(site: Site) -> Iterator[Finding]:
    """Have jobs look around; those that sbatch would refuse are told of already."""
    if site.probe_wait_s is not None and site.accepted:
        yield from look_around(site.settings, site.accepted, site.environ, site.probe_wait_s, site.login)


_CHECKS = (
    _config_cache,
    _tools,
    _controller,
    _federation,
    _partitions,
    _submissions,
    _state_dir,
    _python,
    _address,
    _host,
    _programs,
    _probe_jobs,
)
_NEEDED_BY_OTHERS = ("tools", "munge", "controller")
