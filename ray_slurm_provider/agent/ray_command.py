"""The ``ray start`` of a node: argument list and environment, as pure functions.

Flags and variables are those of ray/scripts/scripts.py and ray/autoscaler/v2/instance_manager/config.py.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ray_slurm_provider.birth_certificate import CERTIFICATE_VARIABLE
from ray_slurm_provider.reports import BOOTSTRAP_CONFIG

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ray_slurm_provider.agent.spec import AgentSpec

# The line that `ray start` prints when the node has joined (ray/scripts/scripts.py, startup_msg).
STARTED_MARK = b"Ray runtime started."
# A queued job keeps its place for days. An integer: Ray takes nothing else here and silently falls back to an hour.
_ONE_YEAR_S = "31536000"
# How many jobs Ray asks for in one round; its own default of 5 would make a large cluster start slowly.
_LAUNCH_BATCH = "100"
# How many it may wait for; those of a type that may not be launched now shall not keep other types waiting.
_LAUNCHES = "1000"
# What the autoscaler tells the workers that it submits; by it a process is known to be the autoscaler.
GCS_ADDRESS_VARIABLE = "RAY_SLURM_GCS_ADDRESS"
# By this one autoscaler v2 recognises the node (ray/autoscaler/v2/instance_manager).
INSTANCE_VARIABLE = "RAY_CLOUD_INSTANCE_ID"
# After a short cut of the network a process may wait for an answer on a connection that the other end has closed; Ray's
# clients look after 300 s whether it still lives. Ray's servers allow them to look once in 60 s (rpc/grpc_server.cc).
CONNECTION_ENVIRONMENT = {"RAY_grpc_client_keepalive_time_ms": "60000"}
# How often the head asks each node what it has and wants: in Ray every second (ray_config_def.h). In a small cluster
# demand need not wait that long, and a large one shall not have more of it.
_PULL_VARIABLE = "RAY_gcs_pull_resource_loads_period_milliseconds"
_SHORTEST_PULL_MS = 200
_LONGEST_PULL_MS = 1000
_PULLS_PER_S = 100
# From this Ray on each node has a temporary directory of its own; before, several on one host collided.
_OLDEST_RAY = (2, 55)
# Flags of `ray start` by the name of their port.
_NODE_FLAGS = {
    "node_manager": "--node-manager-port",
    "object_manager": "--object-manager-port",
    "dashboard_agent": "--dashboard-agent-listen-port",
    "dashboard_agent_grpc": "--dashboard-agent-grpc-port",
    "runtime_env_agent": "--runtime-env-agent-port",
    "metrics_export": "--metrics-export-port",
}
_HEAD_FLAGS = {"gcs": "--port", "client": "--ray-client-server-port", "dashboard": "--dashboard-port"}
# What a person may not pass as well: the report of the node, and with it every command, would be wrong.
OWN_FLAGS = frozenset(
    {
        *_NODE_FLAGS.values(),
        *_HEAD_FLAGS.values(),
        "--head",
        "--block",
        "--address",
        "--dashboard-host",
        "--autoscaling-config",
        "--no-monitor",
        "--node-ip-address",
        "--temp-dir",
        "--min-worker-port",
        "--max-worker-port",
        "--worker-port-list",
    }
)
NODE_PORTS = tuple(_NODE_FLAGS)
HEAD_PORTS = (*_HEAD_FLAGS, "autoscaler_metrics", "dashboard_metrics", *NODE_PORTS)
# Besides one for each task a node needs ports for its dashboard agent, for a driver, and for Ray's own
# workers that spill and restore objects (ray_config_def.h, max_io_workers).
WORKER_PORTS_BESIDES_TASKS = 6
# The metrics pages tell everybody everything: no token protects them. This is no port, so nothing listens.
_NO_METRICS = "-1"
# Bash refuses to set these (bash(1), "Shell Variables"); a failing `export` would keep each command from running.
_READ_ONLY = "BASHOPTS|BASH_VERSINFO|EUID|PPID|SHELLOPTS|UID"
# `ray start` drains until a little before the end, so that its processes still end in order.
_DRAIN_MARGIN_S = 10


def start_command(spec: AgentSpec, address: str, ports: Mapping[str, int], temp_dir: str) -> list[str]:
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
    if spec.is_head:
        command += [
            "--head",
            *(f"{flag}={ports[name]}" for name, flag in _HEAD_FLAGS.items()),
            # Without a token only this host may see the dashboard: it runs code for whoever asks.
            f"--dashboard-host={address if spec.token_auth else '127.0.0.1'}",
            # The agent starts it, see `monitor_command`.
            "--no-monitor",
        ]
    else:
        command.append(f"--address={spec.gcs_address}")
    return [
        *command,
        f"--node-ip-address={address}",
        f"--temp-dir={temp_dir}",
        *(f"{flag}={ports[name]}" for name, flag in _NODE_FLAGS.items()),
        *_worker_ports(spec.worker_ports),
        *spec.ray_start_args,
    ]


def monitor_command(address: str, gcs_address: str, temp_dir: str) -> list[str]:
    """Return the argument list of Ray's autoscaler (ray/_private/services.py, start_monitor)."""
    logs = f"{temp_dir}/session_latest/logs"
    return [
        sys.executable,
        "-u",
        str(_ray_package() / "autoscaler" / "v2" / "monitor.py"),
        f"--logs-dir={logs}",
        f"--gcs-address={gcs_address}",
        f"--stdout-filepath={logs}/monitor.out",
        f"--stderr-filepath={logs}/monitor.err",
        f"--autoscaling-config={temp_dir}/{BOOTSTRAP_CONFIG}",
        f"--monitor-ip={address}",
    ]


def _worker_ports(within: str) -> list[str]:
    """Return the flags for the ports of worker processes: one of the range, or whichever the kernel gives."""
    first, _, last = within.partition("-")
    return [f"--min-worker-port={int(first or 0)}", f"--max-worker-port={int(last or 0)}"]


def start_environment(
    spec: AgentSpec,
    resources: Mapping[str, int],
    ports: Mapping[str, int],
    go: Mapping[str, object],
) -> dict[str, str]:
    """Return the variables that ``ray start`` gets in addition to the job's own."""
    result = {
        **CONNECTION_ENVIRONMENT,
        **access_environment(spec.directory, token_auth=spec.token_auth),
        **({} if spec.metrics else {"RAY_enable_metrics_collection": "0"}),
        "RAY_OVERRIDE_RESOURCES": json.dumps(dict(resources), sort_keys=True),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(0 if spec.is_head else max(spec.drain_s - _DRAIN_MARGIN_S, 0)),
    }
    if spec.labels:
        result["RAY_OVERRIDE_LABELS"] = json.dumps(spec.labels, sort_keys=True)
    if not spec.is_head:
        return result
    return {
        **result,
        "RAY_enable_autoscaler_v2": "1",
        "RAY_USAGE_STATS_ENABLED": "1" if go.get("usage_stats", False) else "0",
        "RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S": _ONE_YEAR_S,
        "RAY_AUTOSCALER_PENDING_NODE_IDLE_TIMEOUT_S": str(spec.withdraw_after_s),
        _PULL_VARIABLE: str(_pull_period_ms(go.get("max_workers"))),
        "AUTOSCALER_UPDATE_INTERVAL_S": str(spec.update_interval_s),
        "AUTOSCALER_MAX_LAUNCH_BATCH": _LAUNCH_BATCH,
        "AUTOSCALER_MAX_CONCURRENT_LAUNCHES": _LAUNCHES,
        "AUTOSCALER_METRIC_PORT": str(ports["autoscaler_metrics"]) if spec.metrics else _NO_METRICS,
        "DASHBOARD_METRIC_PORT": str(ports["dashboard_metrics"]) if spec.metrics else _NO_METRICS,
    }


def _pull_period_ms(max_workers: object) -> int:
    if not isinstance(max_workers, int):
        return _LONGEST_PULL_MS
    return min(max(_SHORTEST_PULL_MS, 1000 * (max_workers + 1) // _PULLS_PER_S), _LONGEST_PULL_MS)


def unfit_ray() -> str:
    """Return what is wrong with the installed Ray, "" for nothing; importing it, or importlib.metadata, costs more."""
    try:
        text = (_ray_package() / "_version.py").read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(r"^version\s*=\s*[\"']((\d+)\.(\d+)[^\"']*)", text, re.MULTILINE)
    if found is None or (int(found[2]), int(found[3])) >= _OLDEST_RAY:
        return ""
    needed = ".".join(map(str, _OLDEST_RAY))
    return f"the Python {sys.executable} has Ray {found[1]}, and ray-slurm-provider needs {needed} or newer"


def _ray_package() -> Path:
    package = importlib.util.find_spec("ray")
    assert package is not None  # noqa: S101 the node has looked for it before
    return Path(next(iter(package.submodule_search_locations or ())))


def access_environment(cluster_dir: Path, *, token_auth: bool) -> dict[str, str]:
    """Return the variables that make a process of Ray know the cluster's token.

    The mode is always set: with it unset, Ray's behaviour depends on files in the user's home.
    """
    if not token_auth:
        return {"RAY_AUTH_MODE": "disabled"}
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(cluster_dir / "auth_token")}


def shell_environment(environ: Mapping[str, str], access: Mapping[str, str]) -> str:
    """Return shell lines that give a command on the node the environment of its job."""
    left_out = re.compile(rf"SLURM|RAY_OVERRIDE|({CERTIFICATE_VARIABLE}|PWD|OLDPWD|SHLVL|_|{_READ_ONLY})$")
    exportable = (name for name in environ if name.isascii() and name.isidentifier())
    kept = {name: environ[name] for name in exportable if not left_out.match(name)}
    variables = {**CONNECTION_ENVIRONMENT, **kept, **access}
    # The caller's shell may be set up for another cluster.
    clean = 'unset "${!RAY_@}"\n'
    return clean + "".join(f"export {name}={shlex.quote(value)}\n" for name, value in sorted(variables.items()))


def promised_resources(spec: AgentSpec, allocated: Mapping[str, int]) -> dict[str, int]:
    """Return what this node tells Ray to have: the allocation, and what a person wrote.

    Raises:
        ValueError: A person wrote more than the allocation has.
    """
    for name in ("CPU", "GPU"):
        if name in spec.written and spec.resources.get(name, 0) > allocated.get(name, 0):
            raise ValueError(
                f"resources.{name} of the YAML is {spec.resources[name]}, but the job has {allocated.get(name, 0)}"
            )
    kept = {name: value for name, value in spec.resources.items() if name in spec.written or name not in allocated}
    if "GPU" in kept and "GPU" not in spec.written and "GPU" not in allocated:
        raise ValueError(f"the job should have {kept['GPU']} GPUs and has none")
    result = {**allocated, **kept}
    total = allocated.get("memory", 0) + allocated.get("object_store_memory", 0)
    for name, other in (("memory", "object_store_memory"), ("object_store_memory", "memory")):
        if name in spec.written and other not in spec.written:
            # What a person wrote stays, and both together stay within the allocation.
            result[other] = min(spec.resources.get(other, allocated[other]), max(total - spec.resources[name], 0))
    return result
