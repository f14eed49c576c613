"""``ray-slurm``: what a person types."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import click

from ray_slurm_provider import __version__
from ray_slurm_provider.cluster_yaml import open_cluster
from ray_slurm_provider.errors import SlurmProviderError
from ray_slurm_provider.node_table import node_rows, print_nodes, watch_nodes
from ray_slurm_provider.sandbox.commands import sandbox


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ray-slurm")
def cli() -> None:
    """Ray clusters whose nodes are SLURM jobs."""


cli.add_command(sandbox)

_yaml = click.argument("config", metavar="CLUSTER.yaml", type=click.Path(path_type=Path))


@cli.command()
@_yaml
@click.option("--client", is_flag=True, help="For Ray Client: RAY_ADDRESS begins with ray://.")
def env(config: Path, client: bool) -> None:
    """Print the exports for: eval "$(ray-slurm env CLUSTER.yaml)"."""
    for name, value in open_cluster(config).access(client=client).items():
        click.echo(f"export {name}={shlex.quote(value)}")


@cli.command()
@_yaml
@click.argument("node_type")
def render(config: Path, node_type: str) -> None:
    """Print the batch script of NODE_TYPE without submitting it."""
    from ray_slurm_provider.bootstrap import script  # noqa: PLC0415 imports Ray, which takes a second

    click.echo(script(config, node_type), nl=False)


@cli.command()
@_yaml
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
@click.option("--watch", is_flag=True, help="Go on until interrupted.")
def nodes(config: Path, as_json: bool, watch: bool) -> None:
    """List the cluster's nodes: job, type, state, reason, place, address, time left, log."""
    cluster = open_cluster(config)
    if watch:
        watch_nodes(cluster)
    elif as_json:
        click.echo(json.dumps([row.__dict__ for row in node_rows(cluster)], indent=1))
    else:
        print_nodes(cluster)


def main() -> None:
    """Run the command line; a mistake is one message and exit code 1, never a traceback."""
    try:
        cli()
    except SlurmProviderError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
