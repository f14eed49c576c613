"""``ray-slurm sandbox ...``."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import click
import yaml
from pydantic import ValidationError

from ray_slurm_provider.errors import SandboxError
from ray_slurm_provider.sandbox.faults import CONTROLLER_FAULTS, NODE_FAULTS, controller_fault, node_fault
from ray_slurm_provider.sandbox.layout import SandboxSpec, read_layout, usual_spec
from ray_slurm_provider.sandbox.lifecycle import Sandbox, SandboxStatus, default_state_dir

_some = click.IntRange(min=0)
_state_dir = click.option(
    "--state-dir",
    type=click.Path(path_type=Path),
    default=default_state_dir,
    envvar="RAY_SLURM_SANDBOX",
    show_envvar=True,
    help="Directory of the sandbox.",
)


@click.group()
def sandbox() -> None:
    """A real SLURM on this machine, for trying things out."""


@sandbox.command()
@click.option("--nodes", type=_some, default=4, show_default=True, help="Virtual nodes of the partition cpu.")
@click.option("--gpu-nodes", type=_some, default=0, show_default=True, help="Virtual nodes of the partition gpu.")
@click.option("--gpus-per-node", type=_some, default=2, show_default=True, help="Fake GPUs of each.")
@click.option("--gpu-type", default="a100", show_default=True, help="Type of the fake GPUs.")
@click.option("--cpus", type=click.IntRange(min=1), default=4, show_default=True, help="CPUs that each node claims.")
@click.option("--memory", default="4G", show_default=True, help="Memory that each node claims.")
@click.option(
    "--isolated", is_flag=True, help="Each node is a machine: own network, host name, /dev/shm and processes."
)
@click.option(
    "--layout",
    type=click.Path(path_type=Path),
    help="A YAML file with nodes, partitions, settings and job_submit, in place of the options above.",
)
@_state_dir
def up(layout: Path | None, state_dir: Path, **numbers: Any) -> None:
    """Start munged, slurmctld and one slurmd per virtual node."""
    spec = _spec(layout, numbers)
    box = Sandbox(state_dir)
    box.up(spec)
    click.echo(f"SLURM is up: {spec.node_count} nodes in {box.paths.root}")
    option = "" if state_dir == default_state_dir() else f" --state-dir {shlex.quote(str(state_dir))}"
    use = f"ray-slurm sandbox run{option} -- bash" if spec.isolated else f'eval "$(ray-slurm sandbox env{option})"'
    click.echo(f"Use it:  {use}")
    click.echo(f"End it:  ray-slurm sandbox down{option}")


def _spec(layout: Path | None, numbers: dict[str, Any]) -> SandboxSpec:
    try:
        if layout is not None:
            spec = read_layout(yaml.safe_load(layout.read_text(encoding="utf-8")))
            return spec.model_copy(update={"isolated": spec.isolated or numbers["isolated"]})
        return usual_spec(**numbers)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise SandboxError(f"{layout or 'the sandbox'}: {where}: {first['msg']}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
        raise SandboxError(f"{layout or 'the sandbox'}: {error}") from None


@sandbox.command()
@_state_dir
def down(state_dir: Path) -> None:
    """End every process and remove every file of the sandbox."""
    box = Sandbox(state_dir)
    existed = box.exists
    box.down()
    click.echo("The sandbox is gone." if existed else f"There is no sandbox in {box.paths.root}.")


@sandbox.command()
@_state_dir
def status(state_dir: Path) -> None:
    """Say what of the sandbox is alive; exit code 1 when something is not."""
    found = Sandbox(state_dir).status()
    click.echo(_describe(found))
    if not found.healthy:
        raise SystemExit(1)


@sandbox.command()
@_state_dir
def env(state_dir: Path) -> None:
    """Print the exports for: eval "$(ray-slurm sandbox env)"."""
    box = Sandbox(state_dir)
    if box.isolated:
        raise SandboxError("an isolated sandbox has a network of its own; use it by: ray-slurm sandbox run -- bash")
    for name, value in box.environment().items():
        click.echo(f"export {name}={shlex.quote(value)}")


@sandbox.command(context_settings={"ignore_unknown_options": True})
@_state_dir
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True)
def run(state_dir: Path, command: tuple[str, ...]) -> None:
    """Run COMMAND with the environment of the sandbox."""
    box = Sandbox(state_dir)
    environment, words = box.command_environment(), box.command(command)
    try:
        os.execvpe(words[0], words, environment)  # noqa: S606 the user's own command
    except OSError as error:
        raise SandboxError(f"{command[0]}: {error.strerror}") from error


@sandbox.command()
@_state_dir
@click.argument("name")
@click.argument("fault", type=click.Choice(NODE_FAULTS))
def node(state_dir: Path, name: str, fault: str) -> None:
    """Make a fault on the virtual node NAME: cut its network, join it again, crash it, boot it."""
    node_fault(Sandbox(state_dir), name, fault)
    click.echo(f"{name}: {fault}")


@sandbox.command()
@_state_dir
@click.argument("fault", type=click.Choice(CONTROLLER_FAULTS))
@click.option("--forget-jobs", is_flag=True, help="With start: its list of jobs is lost.")
def controller(state_dir: Path, fault: str, forget_jobs: bool) -> None:
    """Make a fault on slurmctld: stop, start, freeze, thaw or crash it."""
    if forget_jobs and fault != "start":
        raise click.UsageError("--forget-jobs goes with start")
    controller_fault(Sandbox(state_dir), fault, forget_jobs=forget_jobs)
    click.echo(f"slurmctld: {fault}")


def _describe(status: SandboxStatus) -> str:
    lines = [
        f"slurmctld  {'up' if status.controller else 'DOWN'}",
        f"munged     {'up' if status.munged else 'DOWN'}",
        *(f"{name:<10} {state}" for name, state in sorted(status.nodes.items())),
    ]
    return "\n".join(lines)
