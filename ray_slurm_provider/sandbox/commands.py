"""``ray-slurm sandbox ...``."""

import os
import shlex
from pathlib import Path
from typing import Any

import click
import yaml
from pydantic import ValidationError

from ray_slurm_provider.errors import SandboxError
from ray_slurm_provider.sandbox.layout import REHEARSAL, SandboxSpec, read_layout, usual_spec
from ray_slurm_provider.sandbox.lifecycle import Sandbox, SandboxStatus, default_state_dir
from ray_slurm_provider.slurm.process import clean_environment

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
@click.option("--isolated", is_flag=True, hidden=True)
@click.option(
    "--layout",
    type=click.Path(path_type=Path),
    help="A YAML file with nodes, partitions, settings and job_submit, in place of the options above.",
)
@_state_dir
def up(layout: Path | None, state_dir: Path, isolated: bool, **numbers: Any) -> None:
    """Start munged, slurmctld and one slurmd per virtual node."""
    if isolated:
        raise SandboxError(REHEARSAL)
    spec = _spec(layout, numbers)
    box = Sandbox(state_dir)
    box.up(spec)
    click.echo(f"SLURM is up: {spec.node_count} nodes in {box.paths.root}")
    option = "" if state_dir == default_state_dir() else f" --state-dir {shlex.quote(str(state_dir))}"
    click.echo(f'Use it:  eval "$(ray-slurm sandbox env{option})"')
    click.echo(f"End it:  ray-slurm sandbox down{option}")


def _spec(layout: Path | None, numbers: dict[str, Any]) -> SandboxSpec:
    try:
        return read_layout(yaml.safe_load(layout.read_text(encoding="utf-8"))) if layout else usual_spec(**numbers)
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
    for name, value in Sandbox(state_dir).environment().items():
        click.echo(f"export {name}={shlex.quote(value)}")


@sandbox.command(context_settings={"ignore_unknown_options": True})
@_state_dir
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True)
def run(state_dir: Path, command: tuple[str, ...]) -> None:
    """Run COMMAND with the environment of the sandbox."""
    environment = {**clean_environment(os.environ), **Sandbox(state_dir).environment()}
    try:
        os.execvpe(command[0], command, environment)  # noqa: S606 the user's own command
    except OSError as error:
        raise SandboxError(f"{command[0]}: {error.strerror}") from error


def _refuse(**_: object) -> None:
    raise SandboxError(REHEARSAL)


for _name in ("node", "controller"):
    sandbox.add_command(
        click.Command(
            _name,
            params=[click.Argument(["words"], nargs=-1, type=click.UNPROCESSED)],
            callback=_refuse,
            hidden=True,
            add_help_option=False,
            context_settings={"ignore_unknown_options": True},
        )
    )


def _describe(status: SandboxStatus) -> str:
    lines = [
        f"slurmctld  {'up' if status.controller else 'DOWN'}",
        f"munged     {'up' if status.munged else 'DOWN'}",
        *(f"{name:<10} {state}" for name, state in sorted(status.nodes.items())),
    ]
    return "\n".join(lines)
