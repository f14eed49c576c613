"""Our sections of the cluster YAML: ``provider.slurm`` and ``node_config``.

The models are the one list of keys, types, defaults, documentation and error texts: the reference page
and every refusal come from them. Nothing here imports Ray.
"""

import difflib
import os
import pwd
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from ray_slurm_provider.agent.ports import port_range
from ray_slurm_provider.agent.ray_command import HEAD_PORTS, OWN_FLAGS
from ray_slurm_provider.errors import ConfigError
from ray_slurm_provider.fields import Count, Line, PortRange, Section, ShellLine, not_bool
from ray_slurm_provider.sbatch_options import (
    PROTECTED_OPTIONS,
    SKIPPABLE_OPTIONS,
    SbatchOptions,
    check_directive,
    option_name,
)
from ray_slurm_provider.site_rules import SiteFile

_CLUSTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

# Variables by which Ray recognises a node; the job sets them itself.
PROTECTED_VARIABLES = frozenset(
    {
        "RAY_ADDRESS",
        "RAY_AUTH_MODE",
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_TOKEN_PATH",
        "RAY_CLOUD_INSTANCE_ID",
        "RAY_NODE_TYPE_NAME",
        "RAY_OVERRIDE_LABELS",
        "RAY_OVERRIDE_RESOURCES",
        "RAY_enable_autoscaler_v2",
    }
)


class ResolvedNode(Section, extra="ignore"):  # another release may have written it: a head outlives an installation
    """What the provider makes of a whole node type, for the job: filled in by `bootstrap`, never by hand."""

    steps: list[list[str]] = []
    """Commands to run in the job: where each stands in the YAML, and its text."""
    resources: dict[str, int] = {}
    """Ray resources that the autoscaler counts on."""
    written: list[str] = []
    """Names of those that a person wrote."""
    labels: dict[str, str] = {}
    """Ray labels."""


class NodeConfig(Section):
    """``available_node_types.<type>.node_config``: how the job of such a Ray node looks."""

    placement: Literal["slurm", "login_node"] = "slurm"
    """Where the node runs: ``slurm``, as a job; or ``login_node``, for the head only: where ``ray up`` is typed."""
    sbatch: SbatchOptions = SbatchOptions()
    """Options for sbatch."""
    sbatch_skip: list[Line] = []
    """Options to leave out of the script, in addition to those of ``provider.slurm.sbatch_skip``."""
    sbatch_extra: list[Line] = []
    """Further directives as they stand behind ``#SBATCH``, in addition to those of ``provider.slurm.sbatch_extra``."""
    setup: list[ShellLine] = []
    """Shell lines that run last before Ray starts, in the same shell: ``module load``, ``export``."""
    env: dict[str, Annotated[str | int | float, BeforeValidator(not_bool)]] = {}
    """Environment variables of the job."""
    ray_start_args: list[Line] = []
    """Further arguments for ``ray start``, for example ``--system-reserved-cpu=1``."""
    max_queued_jobs: Count | None = None
    """Most jobs of this type that may wait in the queue at a time."""
    resolved: ResolvedNode | None = Field(default=None, json_schema_extra={"internal": True})
    """Filled in by the provider, never by hand."""


class Ports(Section):
    """``provider.slurm.ports``: for sites with a firewall between their hosts."""

    services: PortRange | None = None
    """Range for Ray's services, for example ``20000-20199``: each node on a host takes some of its own."""
    workers: PortRange | None = None
    """Range for Ray's worker processes, one port each, for example ``21000-21999``; the nodes of a host share it."""


class SlurmSettings(Section):
    """``provider.slurm``: what concerns the whole cluster."""

    state_dir: Line = "~/.ray-slurm"
    """Directory on a file system that login node and compute nodes share; the cluster's own directory is below it."""
    python: Line | None = None
    """Interpreter for the jobs, as an absolute path; the one that runs ``ray up`` when it is not given."""
    slurm_bin: Line | None = None
    """Directory of sbatch, squeue and the others; PATH when it is not given."""
    interface: Line | None = None
    """Network interface whose address Ray uses, for example ``ib0``; of several, ``ib0,eth1``, the first that a host
    has. The address of the SLURM node when it is not given."""
    temp_dir: Line = "/tmp"  # noqa: S108 the agent makes a private directory in it
    """Directory for Ray's temporary files on the compute node; may name variables, for example ``$SLURM_TMPDIR``."""
    sbatch: SbatchOptions = SbatchOptions()
    """sbatch options of every node type that is a job; what a type says itself wins."""
    ports: Ports = Ports()
    """Ranges for Ray's ports; free ones are chosen when it is not given."""
    token_auth: bool = True
    """Whether Ray asks everybody for the cluster's token."""
    tls: bool = False
    """Whether Ray encrypts its connections, with certificates that are made for this cluster."""
    metrics: bool = False
    """Whether Ray offers its metrics (Prometheus); everybody who reaches the host can read them without a token."""
    command_runner: Literal["srun", "ssh"] = "srun"
    """How commands get to a node: ``srun`` into its allocation, or ``ssh`` to its host."""
    ssh_args: list[Line] = []
    """Further arguments for ``ssh``, for example ``-p`` and ``2222``; Ray's section ``auth`` counts too."""
    update_interval_s: Annotated[int, Field(ge=1, le=3600)] = 2
    """Seconds between two rounds of Ray's autoscaler."""
    listing_interval_s: Annotated[int, Field(ge=1, le=3600)] = 60
    """Seconds after which the autoscaler asks squeue again while nothing changes, and six times as often while a job
    waits, starts or ends; what the jobs write about themselves makes it ask at once."""
    withdraw_after_s: Annotated[int, Field(ge=0)] = 300
    """Seconds after which a queued job that nobody needs any more is cancelled."""
    sbatch_skip: list[Line] = []
    """Options that the site does not want, to be left out of every script: ``mem``, ``no_requeue``, ``signal``, ..."""
    sbatch_extra: list[Line] = []
    """Further directives for every job, as they stand behind ``#SBATCH``: ``--gres-flags=enforce-binding``."""
    prologue: list[ShellLine] = []
    """Shell lines that run first in every node, before all setup commands: ``source /etc/profile.d/modules.sh``."""
    epilogue: list[ShellLine] = []
    """Shell lines that run last in every node, when Ray has ended; SLURM gives them KillWait seconds when a job is
    cancelled."""
    max_queued_jobs: Count | None = None
    """Most jobs of this cluster that may wait in the queue at a time; more are submitted when some have started."""
    pause_after_failures: Annotated[int, Field(ge=3)] = 6
    """Failed starts of a node type in a row after which nothing more of it is submitted, until ``ray-slurm resume`` or
    ``ray up``."""
    birth_record: Literal["comment", "file"] = "comment"
    """Where a job's birth certificate is: in its comment, or, where the site owns the comment, in a file and the job's
    name."""
    clusters: Line | None = None
    """Name of the SLURM cluster, where one set of tools speaks to several (``--clusters``)."""
    job_arrays: bool = True
    """Whether workers that are asked for at the same time are submitted as one job array."""
    drain_s: Annotated[int, Field(ge=0, le=3600)] = 60
    """Seconds before the time limit at which Ray is told to move its work away; 0 to be surprised."""
    command_timeout_s: Annotated[int, Field(ge=1)] = 60
    """Seconds after which a SLURM command that gives no answer counts as failed."""
    default_python: Line | None = Field(default=None, json_schema_extra={"internal": True})
    """The interpreter that ran ``ray up``; filled in by the provider, never by hand."""
    site: SiteFile | None = Field(default=None, json_schema_extra={"internal": True})
    """What the site allows; filled in by the provider, never by hand."""

    def directory(self) -> Path:
        path = expanded(self.state_dir)
        if not os.path.isabs(path):  # noqa: PTH117
            raise ConfigError(
                "provider.slurm.state_dir", f"{path!r} is not absolute", "an absolute path, or one with ~"
            )
        return Path(os.path.normpath(path))


def expanded(path: str) -> str:
    """Return a path with ``~`` and variables expanded; ``$USER`` is who it really is, whatever the shell says."""
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        user = os.environ.get("USER", str(os.getuid()))
    named = re.sub(r"\$(USER\b|\{USER\})", lambda _: user, path)
    return os.path.expanduser(os.path.expandvars(named))  # noqa: PTH111 variables may hold "~"


Model = TypeVar("Model", bound=Section)


def read_settings(section: Any, path: str = "provider.slurm") -> SlurmSettings:
    _refuse_protected_options(section, path)
    settings = read_section(SlurmSettings, {} if section is None else section, path)
    settings.directory()
    for name in ("python", "slurm_bin"):
        value = getattr(settings, name)
        if value is not None and not Path(value).expanduser().is_absolute():
            raise ConfigError(f"{path}.{name}", f"{value!r} is not absolute", "an absolute path")
    _check_ports(settings.ports)
    _check_directives(settings, path)
    return settings


def _check_directives(section: SlurmSettings | NodeConfig, path: str) -> None:
    known = set(SbatchOptions.model_fields) | SKIPPABLE_OPTIONS
    for name in section.sbatch_skip:
        if name.replace("-", "_") not in known:
            reason = PROTECTED_OPTIONS.get(name.replace("-", "_"))
            problem = f"{name} cannot be left out: {reason}" if reason else f"{name!r} is no option of the script"
            raise ConfigError(f"{path}.sbatch_skip", problem, f"{', '.join(sorted(SKIPPABLE_OPTIONS))}, mem, ...")
    for directive in section.sbatch_extra:
        try:
            check_directive(directive)
        except ValueError as error:
            raise ConfigError(
                f"{path}.sbatch_extra", f"{directive!r} {error}", "one option in each line of the list"
            ) from None
        _refuse_protected(directive, f"{path}.sbatch_extra")


def _check_ports(ports: Ports) -> None:
    if ports.services is None:
        return
    services = port_range(ports.services)
    if len(services) < len(HEAD_PORTS):
        raise ConfigError(
            "provider.slurm.ports.services",
            f"{ports.services} holds {len(services)} ports, and a head needs {len(HEAD_PORTS)}",
            "a larger range; each further node on a host needs some of its own",
        )
    if ports.workers is not None and set(services) & set(port_range(ports.workers)):
        raise ConfigError("provider.slurm.ports", "services and workers overlap", "two ranges without a common port")


def read_node_config(section: Any, path: str) -> NodeConfig:
    _refuse_protected_options(section, path)
    config = read_section(NodeConfig, {} if section is None else section, path)
    _check_directives(config, path)
    for argument in config.ray_start_args:
        flag = re.split(r"[=\s]", argument)[0]
        if flag in OWN_FLAGS:
            raise ConfigError(
                f"{path}.ray_start_args",
                f"the provider sets {flag} itself",
                "other flags; see provider.slurm.ports, interface and temp_dir",
            )
    for name in config.env:
        if not _VARIABLE.fullmatch(name):
            raise ConfigError(f"{path}.env", f"{name!r} is not a variable name", "letters, digits and _")
        if name in PROTECTED_VARIABLES or name.startswith(("SLURM_", "RAY_SLURM_")):
            raise ConfigError(f"{path}.env.{name}", "the job sets this variable itself", "any other variable")
        if "\0" in str(config.env[name]):
            raise ConfigError(f"{path}.env.{name}", "holds a NUL character", "a text")
    return config


def check_cluster_name(name: Any) -> str:
    if not isinstance(name, str) or not _CLUSTER_NAME.fullmatch(name):
        raise ConfigError(
            "cluster_name",
            f"{name!r} cannot name a cluster",
            "1 to 63 letters, digits, '.', '_' and '-', a letter or digit first",
        )
    return name


def _refuse_protected_options(section: Any, path: str) -> None:
    options = section.get("sbatch") if isinstance(section, dict) else None
    for key in options if isinstance(options, dict) else ():
        _refuse_protected(str(key), f"{path}.sbatch.{key}")


def _refuse_protected(key: str, path: str) -> None:
    reason = PROTECTED_OPTIONS.get(option_name(key))
    if reason is not None:
        raise ConfigError(path, f"the provider sets this option itself: {reason}", "any other option of sbatch")


def read_section(model: type[Model], section: Any, path: str) -> Model:
    if not isinstance(section, dict):
        raise ConfigError(path, f"is {_kind(section)}", "a mapping of keys to values")
    try:
        return model.model_validate(section)
    except ValidationError as error:
        raise _config_error(error.errors(), model, path) from None


def _config_error(errors: list[Any], model: type[BaseModel], path: str) -> ConfigError:
    # An alternative of a union that does not fit is no news when another key is unknown: unknown keys first.
    first = next((error for error in errors if error["type"] == "extra_forbidden"), errors[0])
    owner, keys = _descend(model, first["loc"])
    where = path + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)
    if first["type"] == "extra_forbidden":
        return ConfigError(where, "unknown key", _nearest(str(keys[-1]), owner))
    if first["type"] in {"model_type", "model_attributes_type"}:
        return ConfigError(where, f"is {_kind(first['input'])}", "a mapping of keys to values")
    same = [error for error in errors if _descend(model, error["loc"])[1] == keys]
    wanted = " or ".join(dict.fromkeys(_sentence(error) for error in same))
    return ConfigError(where, f"{_shown(first['input'])} is not allowed: {wanted}", _documentation(owner, keys))


def _descend(model: type[BaseModel], location: tuple[str | int, ...]) -> tuple[type[BaseModel], list[str | int]]:
    """Follow an error's location through the models, and into one list or mapping at the end.

    What comes after that names a branch of a union in pydantic, and no key of the YAML.
    """
    owner, keys = model, []
    for index, part in enumerate(location):
        keys.append(part)
        field = owner.model_fields.get(str(part))
        annotation = None if field is None else field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            owner = annotation
            continue
        if re.match(r"(typing\.)?(dict|list)\[", str(annotation)):
            keys.extend(location[index + 1 : index + 2])
        break
    return owner, keys


def _sentence(error: Mapping[str, Any]) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _documentation(owner: type[BaseModel], keys: list[str | int]) -> str:
    for key in reversed(keys):
        field = owner.model_fields.get(str(key))
        if field is not None and field.description:
            return field.description
    return ""


def _nearest(key: str, model: type[BaseModel]) -> str:
    names = [name for name, field in model.model_fields.items() if not (field.json_schema_extra or {})]
    close = difflib.get_close_matches(key.replace("-", "_"), names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}?"
    if len(names) > 20:
        return "the long names of sbatch's options, with _ for -"
    return ", ".join(names)


def _kind(value: Any) -> str:
    if value is None:
        return "empty"
    names = {
        dict: "a mapping",
        list: "a list",
        str: "a text",
        bool: "a truth value",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), type(value).__name__)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
