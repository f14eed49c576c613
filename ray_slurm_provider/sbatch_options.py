"""The options of sbatch that a YAML may hold, and those that are the provider's."""

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ray_slurm_provider.fields import Count, Gpus, Gres, Line, LineOrCount, Memory, Section, TimeLimit, not_bool

# sbatch options that the provider writes itself, with the reason (sbatch(1)).
PROTECTED_OPTIONS = {
    "array": "the provider makes arrays itself, of workers that are asked for together; see provider.slurm.job_arrays",
    "chdir": "the job starts in the home directory",
    "clusters": "see provider.slurm.clusters",
    "comment": "it holds the job's birth certificate, by which the job is found again",
    "error": "the log is below state_dir; `ray-slurm render` shows where",
    "export": "the job gets the environment of `ray up`; add variables with node_config.env",
    "export_file": "the job gets the environment of `ray up`; add variables with node_config.env",
    "get_user_env": "the job gets the environment of `ray up`",
    "gid": "the job runs as you",
    "input": "the job reads nothing",
    "job_name": "it is ray-<cluster_name>-<node type>",
    "no_requeue": "it is always set: a requeued job would come back under an id that Ray has forgotten",
    "nodes": "a Ray node is one SLURM node",
    "tasks_per_node": "a Ray node is one task; ask for CPUs with cpus_per_task",
    "ntasks": "a Ray node is one task; ask for CPUs with cpus_per_task",
    "ntasks_per_core": "a Ray node is one task",
    "ntasks_per_gpu": "a Ray node is one task",
    "ntasks_per_node": "a Ray node is one task",
    "ntasks_per_socket": "a Ray node is one task",
    "open_mode": "the log is appended to",
    "output": "the log is below state_dir; `ray-slurm render` shows where",
    "parsable": "the provider reads sbatch's answer itself",
    "quiet": "the provider reads sbatch's answer itself",
    "requeue": "a requeued job would come back under an id that Ray has forgotten",
    "signal": "it announces the time limit to Ray; see provider.slurm.drain_s",
    "test_only": "the job is meant to run",
    "uid": "the job runs as you",
    "verbose": "the provider reads sbatch's answer itself",
    "wait": "the provider waits itself",
    "wrap": "the script is the provider's; add lines with node_config.setup",
}


# What the provider writes into every script and a site may not want there. The comment and the log are not among
# them: by these a job is found again, and told about.
SKIPPABLE_OPTIONS = frozenset({"job_name", "no_requeue", "nodes", "ntasks", "open_mode", "signal"})

# In quotes or not, in the part of sbatch's syntax in which a backslash cannot change what belongs together.
_DIRECTIVE = re.compile(r"--[a-z][a-z0-9-]*(=('[^'\\]*'|\"[^\"\\]*\"|[^\s'\"\\#]*))?")


def option_name(text: str) -> str:
    """Return the name of an option, as a field has it, from that of sbatch or a directive."""
    return text.strip().lstrip("-").partition("=")[0].replace("-", "_")


def check_directive(text: str) -> None:
    """Refuse a directive that is not one option by its long name: sbatch takes several on a line, and abbreviations."""
    if _DIRECTIVE.fullmatch(text.strip()) is None:
        raise ValueError("must be one option, --name or --name=value; a value with blanks stands in quotes")
    name = option_name(text)
    known = {*SbatchOptions.model_fields, *PROTECTED_OPTIONS}.union(*_WAYS_AROUND.values())
    full = sorted(option.replace("_", "-") for option in known if option.startswith(name))
    if name not in known and full:
        raise ValueError(f"must be written in full: --{' or --'.join(full)}")


class SbatchOptions(Section):
    """Options of sbatch, by their long names with ``_`` for ``-``; sbatch(1) explains each."""

    account: Line | None = None
    """Account to charge."""
    acctg_freq: LineOrCount | None = None
    """Sampling intervals of the accounting."""
    bb: Line | None = None
    """Burst buffer specification."""
    begin: Line | None = None
    """Earliest start."""
    cluster_constraint: Line | None = None
    """Features of the cluster in a federation."""
    constraint: Line | None = None
    """Features that the SLURM node must have."""
    container: Line | None = None
    """OCI bundle for the job."""
    contiguous: bool | None = None
    """Only contiguous SLURM nodes."""
    core_spec: Annotated[int, Field(ge=0)] | None = None
    """Cores reserved for the system."""
    cores_per_socket: Count | None = None
    """Least number of cores per socket."""
    cpu_freq: LineOrCount | None = None
    """CPU frequency."""
    cpus_per_gpu: Count | None = None
    """CPUs for each GPU."""
    cpus_per_task: Count | None = None
    """CPUs of the Ray node; 1 when it is not given."""
    deadline: Line | None = None
    """Remove the job when it cannot end before this time."""
    delay_boot: LineOrCount | None = None
    """Minutes to wait before booting nodes for a feature."""
    dependency: Line | None = None
    """Start only after other jobs."""
    distribution: Line | None = None
    """Distribution of tasks."""
    exclude: Line | None = None
    """SLURM nodes not to use."""
    exclusive: bool | Literal["user", "mcs", "topo"] | None = None
    """A whole SLURM node; the Ray node then has all its CPUs."""
    gpu_bind: Line | None = None
    """Binding of tasks to GPUs."""
    gpu_freq: LineOrCount | None = None
    """GPU frequency."""
    gpus: Gpus | None = None
    """GPUs of the job: 2, or a100:2."""
    gpus_per_node: Gpus | None = None
    """GPUs per SLURM node: 2, or a100:2."""
    gpus_per_task: Gpus | None = None
    """GPUs per task: 2, or a100:2."""
    gres: Gres | None = None
    """Generic resources: gpu:1, gpu:a100:4."""
    gres_flags: Line | None = None
    """Flags for generic resources."""
    hint: Line | None = None
    """Binding hint."""
    hold: bool | None = None
    """Submit on hold."""
    kill_on_invalid_dep: Literal["yes", "no"] | None = None
    """What to do with a dependency that can never be fulfilled."""
    licenses: Line | None = None
    """Licenses."""
    mail_type: Line | None = None
    """Events to send mail for."""
    mail_user: Line | None = None
    """Who gets the mail."""
    mcs_label: Line | None = None
    """MCS label."""
    mem: Memory | None = None
    """Memory of the Ray node: 4G, 512M, or a number of MiB; 0 for all of the SLURM node."""
    mem_bind: Line | None = None
    """NUMA memory binding."""
    mem_per_cpu: Memory | None = None
    """Memory for each CPU."""
    mem_per_gpu: Memory | None = None
    """Memory for each GPU."""
    mincpus: Count | None = None
    """Least number of CPUs of the SLURM node."""
    network: Line | None = None
    """Network specification."""
    nice: Annotated[int, BeforeValidator(not_bool)] | None = None
    """Adjustment of the priority."""
    no_kill: bool | None = None
    """Do not end the job when one of its nodes fails."""
    nodefile: Line | None = None
    """File with a node list."""
    nodelist: Line | None = None
    """SLURM nodes to use."""
    overcommit: bool | None = None
    """Overcommit CPUs."""
    oversubscribe: bool | None = None
    """Share resources with other jobs."""
    partition: Line | None = None
    """Partition, or a list of partitions."""
    power: Line | None = None
    """Power management."""
    prefer: Line | None = None
    """Features that the SLURM node should have."""
    priority: LineOrCount | None = None
    """Priority of the job."""
    profile: Line | None = None
    """Profiling data to collect."""
    propagate: bool | Line | None = None
    """Limits to propagate."""
    qos: Line | None = None
    """Quality of service."""
    reboot: bool | None = None
    """Reboot the nodes first."""
    reservation: Line | None = None
    """Reservation to use."""
    sockets_per_node: Count | None = None
    """Least number of sockets."""
    spread_job: bool | None = None
    """Spread over many nodes."""
    switches: LineOrCount | None = None
    """Most switches."""
    thread_spec: Annotated[int, Field(ge=0)] | None = None
    """Threads reserved for the system."""
    threads_per_core: Count | None = None
    """Threads per core."""
    time: TimeLimit | None = None
    """Time limit, in quotes: "24:00:00", "2-00:00:00", "90" minutes."""
    time_min: TimeLimit | None = None
    """Least time limit, in quotes."""
    tmp: Memory | None = None
    """Least temporary disk space of the SLURM node."""
    use_min_nodes: bool | None = None
    """Prefer fewer nodes."""
    wait_all_nodes: Literal[0, 1] | None = None
    """Start when all nodes are ready."""
    wckey: Line | None = None
    """Workload characterisation key."""

    def chosen(self) -> dict[str, bool | int | str]:
        return {name: value for name, value in self if value is not None}


# Ways to say the same: whoever says one of them does not want another one's default.
_ALTERNATIVES = (
    ("mem", "mem_per_cpu", "mem_per_gpu"),
    ("gres", "gpus", "gpus_per_node", "gpus_per_task"),
)
# Further options that would give more than one which a site has locked.
_WAYS_AROUND = {
    "cpus_per_task": ("cpus_per_gpu", "tres_per_task"),
    "gres": ("gpus_per_socket", "tres_per_task"),
    "licenses": ("tres_per_task",),
    "nodelist": ("nodefile",),
    "cores_per_socket": ("extra_node_info",),
    "sockets_per_node": ("extra_node_info",),
    "threads_per_core": ("extra_node_info",),
    "oversubscribe": ("share",),
}


def with_alternatives(names: Iterable[str]) -> set[str]:
    """Return sbatch options and those that say the same in another way."""
    found = set(names)
    return found.union(*(group for group in _ALTERNATIVES if found & set(group)))


def ways_around(name: str) -> set[str]:
    """Return the other options that a user could give in place of one that a site has locked."""
    group = with_alternatives([name])
    return group.union(*(_WAYS_AROUND.get(option, ()) for option in group)) - {name}


def with_defaults(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return sbatch options with defaults for what they do not say, in this way or in another."""
    options = {name: value for name, value in options.items() if value is not None}
    said = with_alternatives(options)
    return {**{name: value for name, value in defaults.items() if name not in said}, **options}
