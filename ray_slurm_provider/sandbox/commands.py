"""``ray-slurm sandbox ...``."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import click

from ray_slurm_provider.errors import SandboxError
from ray_slurm_provider.sandbox.layout import SandboxSpec
from ray_slurm_provider.sandbox.lifecycle import Sandbox, SandboxStatus, default_state_dir
from ray_slurm_provider.slurm.parse import parse_mem_mib

_DEFAULTS = SandboxSpec()

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
@click.option("--nodes", default=_DEFAULTS.nodes, show_default=True, help="Virtual nodes of the partition cpu.")
@click.option("--gpu-nodes", default=_DEFAULTS.gpu_nodes, show_default=True, help="Virtual nodes of the partition gpu.")
@click.option("--gpus-per-node", default=_DEFAULTS.gpus_per_node, show_default=True, help="Fake GPUs of each.")
@click.option("--gpu-type", default=_DEFAULTS.gpu_type, show_default=True, help="Type of the fake GPUs.")
@click.option("--cpus", default=_DEFAULTS.cpus, show_default=True, help="CPUs that each node claims.")
@click.option("--memory", default="4G", show_default=True, help="Memory that each node claims.")
@_state_dir
def up(nodes: int, gpu_nodes: int, gpus_per_node: int, gpu_type: str, cpus: int, memory: str, state_dir: Path) -> None:
    """Start munged, slurmctld and one slurmd per virtual node."""
    try:
        memory_mib = parse_mem_mib(memory)
    except ValueError as error:
        raise SandboxError(f"--memory: {error}; write for example 4G") from error
    spec = SandboxSpec(nodes, gpu_nodes, gpus_per_node, cpus, memory_mib, gpu_type)
    box = Sandbox(state_dir)
    box.up(spec)
    click.echo(f"SLURM is up: {spec.node_count} nodes of {cpus} CPUs and {memory} in {box.paths.root}")
    option = "" if state_dir == default_state_dir() else f" --state-dir {shlex.quote(str(state_dir))}"
    click.echo(f'Use it:  eval "$(ray-slurm sandbox env{option})"')
    click.echo(f"End it:  ray-slurm sandbox down{option}")


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
    for name, value in Sandbox(state_dir).environment().items():
        click.echo(f"export {name}={shlex.quote(value)}")


@sandbox.command(context_settings={"ignore_unknown_options": True})
@_state_dir
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True)
def run(state_dir: Path, command: tuple[str, ...]) -> None:
    """Run COMMAND with the environment of the sandbox."""
    environment = Sandbox(state_dir).command_environment()
    try:
        os.execvpe(command[0], command, environment)  # noqa: S606 the user's own command
    except OSError as error:
        raise SandboxError(f"{command[0]}: {error.strerror}") from error


def _describe(status: SandboxStatus) -> str:
    lines = [
        f"slurmctld  {'up' if status.controller else 'DOWN'}",
        f"munged     {'up' if status.munged else 'DOWN'}",
        *(f"{name:<10} {state}" for name, state in sorted(status.nodes.items())),
    ]
    return "\n".join(lines)
