"""``ray-slurm``: what a person types."""

import getpass
import json
import os
import shlex
import signal
import sys
from contextlib import suppress
from pathlib import Path

import click

from ray_slurm_provider import __version__
from ray_slurm_provider.access import ACCESS_VARIABLES, access_variables, private_temp_dir, ready_head_report
from ray_slurm_provider.cluster_yaml import load, open_cluster, settings_of
from ray_slurm_provider.clusters import find_clusters
from ray_slurm_provider.config import SlurmSettings
from ray_slurm_provider.deployment.commands import deploy
from ray_slurm_provider.errors import ConfigError, SlurmProviderError
from ray_slurm_provider.findings import FAILURE
from ray_slurm_provider.garbage import find_garbage, remove_garbage
from ray_slurm_provider.node_logs import find_log, print_log
from ray_slurm_provider.node_table import node_rows, print_clusters, print_nodes, watch_nodes
from ray_slurm_provider.sandbox.commands import sandbox
from ray_slurm_provider.slurm.client import SlurmClient
from ray_slurm_provider.slurm.process import SlurmTools
from ray_slurm_provider.tunnel import CLIENT_PORT, DASHBOARD_PORT, full_host_name, tunnel_command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ray-slurm")
def cli() -> None:
    """Ray clusters whose nodes are SLURM jobs."""


cli.add_command(sandbox)
cli.add_command(deploy)


_yaml = click.argument("config", metavar="CLUSTER.yaml", type=click.Path(path_type=Path))


@cli.command()
@_yaml
@click.option("--client", is_flag=True, help="For Ray Client: RAY_ADDRESS begins with ray://.")
def env(config: Path, client: bool) -> None:
    """Print the exports for: eval "$(ray-slurm env CLUSTER.yaml)"."""
    variables = access_variables(open_cluster(config), client=client)
    # What a shell may still hold of another cluster.
    click.echo(f"unset {' '.join(sorted(ACCESS_VARIABLES - set(variables)))}")
    for name, value in {**variables, **private_temp_dir()}.items():
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
@click.option("--fast", is_flag=True, help="Submit nothing: ask this host and SLURM only.")
@click.option("--wait", default=60.0, show_default=True, help="Seconds to wait for the probe jobs to start.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def check(config: Path, fast: bool, wait: float, as_json: bool) -> None:
    """Tell whether `ray up` will work; exit code 1 when it will not.

    A small job of each node type looks around on the compute nodes, and is gone again at the end.
    """
    from ray_slurm_provider.preflight import preflight  # noqa: PLC0415 imports Ray, which takes a second

    # Its jobs shall go when it is ended, too.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    failed = False
    findings = []
    for finding in preflight(config, os.environ, None if fast else wait):
        failed |= finding.level == FAILURE
        findings.append(finding.__dict__)
        if not as_json:
            advice = f"\n{'':19}-> {finding.advice}" if finding.advice else ""
            click.echo(f"{finding.level:<8} {finding.check}: {finding.text}{advice}")
    if as_json:
        click.echo(json.dumps(findings, indent=1))
    if failed:
        raise SystemExit(1)


@cli.command(hidden=True, add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def migrate(words: tuple[str, ...]) -> None:
    """Say where the script is."""
    package = Path(__file__).parent
    script = next(at for at in (package / "deploy/migrate.py", package.parent / "deploy/migrate.py") if at.exists())
    command = shlex.join([sys.executable, str(script), *(words or ["OLD.yaml"])])
    raise SlurmProviderError(f"migrate is a script, not a command: {command}")


@cli.command()
def schema() -> None:
    """Print the JSON Schema of a cluster YAML, for editors."""
    from ray_slurm_provider.yaml_schema import yaml_schema  # noqa: PLC0415 imports Ray, which takes a second

    click.echo(json.dumps(yaml_schema(), indent=1, sort_keys=True))


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


@cli.command()
@_yaml
@click.argument("node_type", default="")
def resume(config: Path, node_type: str) -> None:
    """Launch NODE_TYPE again although its starts have failed; every type when none is named.

    Hosts that are avoided are tried again as well.
    """
    types = load(config).get("available_node_types")
    if node_type and isinstance(types, dict) and node_type not in types:
        raise ConfigError("NODE_TYPE", f"{node_type!r} is no node type of {config}", ", ".join(map(str, types)))
    lifted = open_cluster(config).launches.resume(node_type)
    click.echo(f"resumed: {', '.join(lifted)}" if lifted else "nothing was paused")


@cli.command()
@_yaml
@click.argument("node", default="")
@click.option("-f", "--follow", is_flag=True, help="Go on until the node ends, or Ctrl-C.")
@click.option("-n", "--lines", type=click.IntRange(min=0), help="Only the last lines.")
def logs(config: Path, node: str, follow: bool, lines: int | None) -> None:
    """Print the log of NODE: id, job, host or address; the head's when it is not given."""
    cluster = open_cluster(config)
    log = find_log(cluster, node)
    click.echo(f"==> {log} <==", err=True)
    with suppress(KeyboardInterrupt):
        print_log(cluster, log, lines=lines, follow=follow)


@cli.command("ssh-command")
@_yaml
@click.option("--login-host", default=full_host_name, show_default="this host", help="The login node's name.")
@click.option("--user", default=getpass.getuser, show_default="you", help="The user there.")
def ssh_command(config: Path, login_host: str, user: str) -> None:
    """Print the ssh line with which a laptop reaches dashboard and Ray Client through the login node."""
    cluster = open_cluster(config)
    report = ready_head_report(cluster)
    protected = cluster.settings.token_auth
    click.echo(tunnel_command(report, user, login_host, dashboard_on_loopback=not protected))
    notes = [
        "Run it on your laptop. Then, there:",
        f"  dashboard   http://127.0.0.1:{DASHBOARD_PORT}",
        f"  Ray Client  ray://127.0.0.1:{CLIENT_PORT}",
        *([f"  token       ssh {user}@{login_host} cat {cluster.directory.token_file}"] if protected else []),
    ]
    click.echo("\n".join(notes), err=True)


_state_dir = click.option(
    "--state-dir",
    type=click.Path(path_type=Path),
    show_default="the site's, or ~/.ray-slurm",
    help="Where to look for clusters that have no job.",
)


def _without_yaml() -> tuple[SlurmSettings, SlurmClient]:
    """Return what the site says, and the way to SLURM, for commands that take no YAML."""
    settings = settings_of({"provider": {}})
    return settings, SlurmClient(SlurmTools(settings.slurm_bin or "", cluster=settings.clusters or ""))


@cli.command()
@_state_dir
@click.option("--yes", is_flag=True, help="End and remove what is listed.")
def gc(state_dir: Path | None, yes: bool) -> None:
    """List jobs and directories that belong to none of your clusters that live; with --yes, end and remove them."""
    settings, slurm = _without_yaml()
    garbage = find_garbage(slurm, state_dir or settings.directory(), settings.temp_dir)
    for line in [*garbage.kept, *(garbage.lines() or ["nothing is left over"])]:
        click.echo(line)
    if garbage and yes:
        remove_garbage(slurm, garbage, settings.temp_dir)
        click.echo("all of it is gone")
    elif garbage:
        click.echo("Nothing was touched; --yes ends and removes all of it.")


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
@_state_dir
def clusters(as_json: bool, state_dir: Path | None) -> None:
    """List all your clusters and how they stand."""
    settings, slurm = _without_yaml()
    rows = find_clusters(slurm, state_dir or settings.directory())
    if as_json:
        click.echo(json.dumps([row.__dict__ for row in rows], indent=1))
    else:
        print_clusters(rows)


def main() -> None:
    """Run the command line; a mistake is one message and exit code 1, never a traceback."""
    try:
        cli()
    except SlurmProviderError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
