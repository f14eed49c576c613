"""The batch script of a Ray node, rendered by a pure function.

Directives are sorted, values are quoted, newlines are refused, and anybody can print the script without
submitting it: ``ray-slurm render``.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from ray_slurm_provider.errors import ConfigError
from ray_slurm_provider.sbatch_options import SbatchOptions
from ray_slurm_provider.slurm.parse import parse_time_s

# Signals reach a job up to 60 s early (sbatch(1), --signal), and the agent needs a few seconds itself.
_DRAIN_SIGNAL = "USR1"
# What a job knows of its own number; an element of an array has two (sbatch(1), OUTPUT ENVIRONMENT VARIABLES).
_JOB_NUMBER = "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
_SAFE_WORD = re.compile(r"[A-Za-z0-9@%+=:,./_-]+")


@dataclass(frozen=True)
class JobSpec:
    """Everything that a node's batch script says."""

    job_name: str  # name in squeue
    comment: str  # the birth certificate; "" where it is in a file
    token: str  # the launch token in it
    node_type: str  # the Ray node type
    cluster_dir: Path  # the cluster's directory
    options: SbatchOptions  # the sbatch options of the YAML
    count: int = 1  # how many such jobs; more than one are an array
    skip: Sequence[str] = ()  # names of options to leave out
    avoid: Sequence[str] = ()  # SLURM nodes on which it shall not start, besides those of the options
    extra: Sequence[str] = ()  # further directives as they stand behind ``#SBATCH``
    steps: Sequence[tuple[str, str]] = ()  # what to run first: where it stands in the YAML, and the command
    env: Mapping[str, str | int | float] = field(default_factory=dict)  # environment variables
    python: str = ""  # interpreter for the agent; "" to take the one that the steps leave on PATH
    path_prefix: str = ""  # directory that goes to the front of PATH; "" for none
    wait_for_go: bool = False  # whether to wait until `ray up` has put everything in place (the head does)
    drain_s: int = 0  # seconds before the time limit at which the agent is told; 0 for never
    agent: Mapping[str, Any] = field(default_factory=dict)  # what the agent needs to know, as JSON
    module: str = ""  # what to become in place of the agent; "" for the agent


def render(spec: JobSpec) -> str:
    directives = [_directive(name, value) for name, value in sorted(directive_values(spec).items())]
    directives += [f"#SBATCH {directive.strip()}" for directive in spec.extra]
    # Whether Ray's nodes are elements of an array is nobody's business in their tasks.
    alone = [] if spec.count == 1 else ['unset "${!SLURM_ARRAY_@}"']
    return "\n".join(["#!/bin/bash", *directives, "", *_identity(spec, _JOB_NUMBER), *alone, *_body(spec)])


def render_process(spec: JobSpec, host: str) -> str:
    """Return the script of a head that is a process on the login node, with no SLURM around it."""
    redirect = 'exec >>"$RAY_SLURM_DIR/logs/$RAY_CLOUD_INSTANCE_ID.log" 2>&1'
    return "\n".join(["#!/bin/bash", "", *_identity(spec, f"login-{host}-$$"), redirect, *_body(spec)])


def _identity(spec: JobSpec, number: str) -> list[str]:
    return [
        f"# Ray node of type {json.dumps(spec.node_type)}; made by ray-slurm-provider.",
        f"export RAY_SLURM_DIR={shlex.quote(str(spec.cluster_dir))}",
        f'export RAY_CLOUD_INSTANCE_ID="{number}-{spec.token}"',
        f"export RAY_NODE_TYPE_NAME={shlex.quote(spec.node_type)}",
    ]


def _body(spec: JobSpec) -> list[str]:
    agent = json.dumps(dict(spec.agent), sort_keys=True)
    return [
        *([f'export PATH={shlex.quote(spec.path_prefix)}:"$PATH"'] if spec.path_prefix else []),
        "cd || :",
        "",
        static_part().rstrip(),
        "",
        *([f'ray_slurm_wait_for_go "$RAY_SLURM_DIR/nodes/{spec.token}.go"'] if spec.wait_for_go else []),
        *(f"export {name}={shlex.quote(str(value))}" for name, value in sorted(spec.env.items())),
        *(f"ray_slurm_step {shlex.quote(where)} {shlex.quote(command)}" for where, command in spec.steps),
        f"ray_slurm_become_agent {shlex.quote(spec.python)} {shlex.quote(agent)} {spec.module}".rstrip(),
        "",
    ]


def directive_values(spec: JobSpec) -> dict[str, bool | int | str]:
    number = "%A" if spec.count == 1 else "%A_%a"
    log = str(spec.cluster_dir / "logs").replace("%", "%%") + f"/{number}-{spec.token}.log"
    ours: dict[str, bool | int | str] = {
        **({"array": f"0-{spec.count - 1}"} if spec.count > 1 else {}),
        **({"comment": spec.comment} if spec.comment else {}),
        "job-name": spec.job_name,
        "no-requeue": True,
        "nodes": 1,
        "ntasks": 1,
        "open-mode": "append",
        "output": log,
    }
    if spec.drain_s and _long_enough(spec):
        ours["signal"] = f"B:{_DRAIN_SIGNAL}@{spec.drain_s}"
    theirs = {name.replace("_", "-"): value for name, value in spec.options.chosen().items()}
    if spec.avoid:
        theirs["exclude"] = ",".join(str(part) for part in (theirs.get("exclude"), *spec.avoid) if part)
    skipped = {name.replace("_", "-") for name in spec.skip}
    return {name: value for name, value in {**theirs, **ours}.items() if name not in skipped}


def log_path(cluster_dir: Path, node_id: str) -> Path:
    return cluster_dir / "logs" / f"{node_id}.log"


@cache
def static_part() -> str:
    return resources.files("ray_slurm_provider").joinpath("scripts/job.sh").read_text(encoding="utf-8")


def _long_enough(spec: JobSpec) -> bool:
    # A signal that is due before the job starts would drain the node at once.
    limit_s = parse_time_s(spec.options.time) if spec.options.time else None
    return limit_s is None or limit_s > 3 * spec.drain_s


def _directive(name: str, value: bool | int | str) -> str:
    if value is True:
        return f"#SBATCH --{name}"
    if value is False:
        return f"# --{name} is off"
    return f"#SBATCH --{name}={_quoted(name, str(value))}"


def _quoted(name: str, value: str) -> str:
    """Quote a value for sbatch's own parser of directives, in which a backslash escapes even in single quotes."""
    if not value.isprintable():
        raise ConfigError(f"sbatch.{name.replace('-', '_')}", f"{value!r} holds a control character", "one line")
    if _SAFE_WORD.fullmatch(value):
        return value
    quote = '"' if "'" in value else "'"
    return quote + value.replace("\\", "\\\\").replace(quote, "\\" + quote) + quote
