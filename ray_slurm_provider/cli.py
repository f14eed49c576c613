"""``ray-slurm``: what a person types."""

from __future__ import annotations

import sys

import click

from ray_slurm_provider import __version__
from ray_slurm_provider.errors import SlurmProviderError
from ray_slurm_provider.sandbox.commands import sandbox


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ray-slurm")
def cli() -> None:
    """Ray clusters whose nodes are SLURM jobs."""


cli.add_command(sandbox)


def main() -> None:
    """Run the command line; a mistake is one message and exit code 1, never a traceback."""
    try:
        cli()
    except SlurmProviderError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
