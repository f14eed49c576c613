"""A SLURM whose nodes are machines that a person can cut off, crash and boot: ``python -m tests.faults.rehearsal``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from ray_slurm_provider.errors import SlurmProviderError
from ray_slurm_provider.sandbox.layout import usual_spec
from ray_slurm_provider.slurm.process import clean_environment

from .machines import CONTROLLER_FAULTS, LOGIN, NODE_FAULTS, MachineSandbox


@click.group(context_settings={"show_default": True})
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path),
    default=f"/tmp/ray-slurm-rehearsal-{os.getuid()}",
    envvar="RAY_SLURM_REHEARSAL",
)
@click.pass_context
def rehearsal(context, state_dir):
    """A real SLURM with faults on order."""
    context.obj = MachineSandbox(state_dir)


@rehearsal.command()
@click.option("--nodes", type=click.IntRange(min=1), default=4)
@click.pass_obj
def up(box, nodes):
    """Start it."""
    box.up(usual_spec(nodes=nodes))
    click.echo(f"SLURM is up in {box.paths.root}; use it: python -m tests.faults.rehearsal run -- bash")


@rehearsal.command()
@click.pass_obj
def down(box):
    """End it and remove its files."""
    box.down()


@rehearsal.command(context_settings={"ignore_unknown_options": True})
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True)
@click.pass_obj
def run(box, command):
    """Run COMMAND on the login machine."""
    words = box.machines.command(LOGIN, command, str(Path.cwd()))
    os.execvpe(words[0], words, {**clean_environment(os.environ), **box.environment()})


@rehearsal.command()
@click.argument("name")
@click.argument("fault", type=click.Choice(NODE_FAULTS))
@click.pass_obj
def node(box, name, fault):
    """Cut the network of a node, join it again, crash or boot it."""
    box.node_fault(name, fault)


@rehearsal.command()
@click.argument("fault", type=click.Choice(list(CONTROLLER_FAULTS)))
@click.option("--forget-jobs", is_flag=True, help="With start: its list of jobs is lost.")
@click.pass_obj
def controller(box, fault, forget_jobs):
    """Stop, start, freeze, thaw or crash slurmctld."""
    if forget_jobs and fault != "start":
        raise click.UsageError("--forget-jobs goes with start")
    box.controller_fault(fault, forget_jobs=forget_jobs)


if __name__ == "__main__":
    try:
        rehearsal()
    except SlurmProviderError as error:
        sys.exit(f"Error: {error}")
