"""``ray-slurm deploy``."""

import getpass
import os
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, cast

import click

from ray_slurm_provider.cluster_yaml import settings_of
from ray_slurm_provider.config import check_cluster_name
from ray_slurm_provider.deployment.document import Deployment, template_directory
from ray_slurm_provider.deployment.proposal import Wishes
from ray_slurm_provider.deployment.site_document import site_document, user_yaml
from ray_slurm_provider.deployment.survey import Survey, take_survey, usual_account
from ray_slurm_provider.errors import DeployError
from ray_slurm_provider.site_file import parse_site, read_site, site_file_to_write, without_site_file
from ray_slurm_provider.slurm.client import SlurmClient
from ray_slurm_provider.slurm.parse import format_time, parse_time_s
from ray_slurm_provider.slurm.process import SlurmTools

_STDOUT = "-"


def _refused(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> None:
    if values:
        raise DeployError(
            "SLURM does itself what --max-time, --require and --forbid did, with MaxTime of a partition, QOS and"
            " job_submit plugins; docs/site.md shows how"
        )


@click.command()
@click.option("-y", "--yes", is_flag=True, help="Ask nothing: take what the other options say, and the defaults.")
@click.option(
    "-p", "--partition", "partitions", multiple=True, help="Partition to use, may be repeated [default: all]."
)
@click.option("-A", "--account", help="Account to charge [default: what SLURM takes].")
@click.option("--qos", help="Quality of service [default: what SLURM takes].")
@click.option("--head", type=click.Choice(["slurm", "login-node"]), help="Where the head runs [default: slurm].")
@click.option("-t", "--time", "time", help="Time limit of the workers [default: 4 hours, if the partition allows].")
@click.option("--head-time", help="Time limit of the head [default: the longest, up to 7 days].")
@click.option("--max-workers", type=click.IntRange(min=1), help="Most workers [default: 10, if there are as many].")
@click.option(
    "--setup", multiple=True, help="Shell line for every node, such as 'module load python'; may be repeated."
)
@click.option("--state-dir", help="Directory that login and compute nodes share [default: ~/.ray-slurm].")
@click.option("--cluster-name", help="Name of the cluster [default: yours].")
@click.option("--template", hidden=True)
@click.option("--slurm-bin", help="Directory of sbatch and the others [default: PATH].")
@click.option("--interface", help="Network interface for Ray, such as ib0 [default: the address that SLURM knows].")
@click.option("--service-ports", help="Range for Ray's services behind a firewall, such as 22000-22199.")
@click.option("--worker-ports", help="Range for Ray's worker processes, such as 30000-30999.")
@click.option("-o", "--output", help="File to write, - to print it [default: ray-slurm.yaml].")
@click.option("-f", "--force", is_flag=True, help="Replace a file that is there.")
@click.option("--site", "for_site", is_flag=True, help="For admins: write the site file that holds for all users.")
@click.option("--site-name", help="With --site: the site's name, for messages [default: SLURM's name of the cluster].")
@click.option("--contact", default="", help="With --site: whom users may ask.")
@click.option("--max-nodes", type=click.IntRange(min=1), help="With --site: nodes of a cluster [default: as proposed].")
@click.option("--max-queued-jobs", type=click.IntRange(min=1), help="With --site: queued jobs of a cluster.")
@click.option("--lock", multiple=True, help="With --site: key of provider.slurm that users cannot change: state_dir.")
@click.option("--no-login-node-head", is_flag=True, help="With --site: heads are jobs only.")
@click.option("--max-time", "--require", "--forbid", hidden=True, multiple=True, expose_value=False, callback=_refused)
def deploy(*, yes: bool, for_site: bool, output: str | None, force: bool, **answers: Any) -> None:
    """Ask SLURM what this site has, and write a cluster YAML for it."""
    if answers["template"] is not None:
        raise DeployError(f"deploy takes no --template: copy a template from {template_directory()} and edit it")
    with without_site_file() if for_site else nullcontext():
        _deploy(yes=yes, for_site=for_site, output=output, force=force, answers=answers)


def _deploy(*, yes: bool, for_site: bool, output: str | None, force: bool, answers: dict[str, Any]) -> None:
    from ray_slurm_provider.deployment import deploy as deployment  # noqa: PLC0415 imports Ray, which takes a second

    ours = settings_of({"provider": {"slurm": {"slurm_bin": answers["slurm_bin"]} if answers["slurm_bin"] else {}}})
    survey = take_survey(SlurmClient(SlurmTools(ours.slurm_bin or "", cluster=ours.clusters or "")))
    asks = not yes and sys.stdin.isatty() and sys.stderr.isatty()
    _tell_site(survey)
    wishes = _wishes(survey, answers, asks=asks)
    path = _output(output, for_site=for_site, asks=asks)
    made = deployment.make_cluster_yaml(
        survey,
        wishes,
        file_name="ray-slurm.yaml" if str(path) == _STDOUT or for_site else path.name,
        settings=_settings(answers, for_site=for_site),
        max_nodes=_max_nodes(answers, for_site=for_site),
        environ=os.environ,
        tell=lambda line: click.echo(f"  note: {line}", err=True),
    )
    _tell_types(made)
    text = made.text
    if for_site:
        text = site_document(made, answers, survey.cluster)
        parse_site(text, path)
    if str(path) == _STDOUT:
        click.echo(text, nl=False)
        return
    there, changes = path.exists(), deployment.difference(path, text)
    if changes:
        click.echo(changes)
    deployment.write_file(path, text, force=force)
    click.echo(f"Wrote {path}" if changes or not there else f"{path} was like this already", err=True)
    if for_site:
        click.echo("A user's whole YAML is now, for example:\n", err=True)
        click.echo(user_yaml(), err=True)
    else:
        click.echo(f"Next:  ray-slurm check {path}   then   ray up {path} --no-config-cache", err=True)


def _wishes(survey: Survey, answers: dict[str, Any], *, asks: bool) -> Wishes:
    names = [partition.name for partition in survey.open_partitions]
    partitions = list(answers["partitions"])
    account = answers["account"] or usual_account(os.environ)
    head = answers["head"] or "slurm"
    setup = list(answers["setup"])
    name = answers["cluster_name"] or re.sub(r"[^A-Za-z0-9._-]", "-", getpass.getuser()).lstrip("._-") or "ray"
    time = answers["time"]
    if asks:
        name = answers["cluster_name"] or click.prompt("Name of the cluster", default=name, err=True)
        if not partitions and len(names) > 1:
            said = click.prompt(f"Partitions (of {', '.join(names)})", default="all", err=True)
            partitions = [] if said == "all" else re.split(r"[,\s]+", said.strip())
        if not account and len(survey.accounts) > 1:
            account = click.prompt(f"Account (of {', '.join(survey.accounts)})", default=survey.accounts[0], err=True)
        head = answers["head"] or click.prompt(
            "Head", default=head, type=click.Choice(["slurm", "login-node"]), err=True
        )
        time = time or click.prompt("Time limit of the workers", default="04:00:00", err=True)
        if not setup:
            line = click.prompt("Shell line for every node, such as 'module load python'", default="", err=True)
            setup = [line] if line.strip() else []
    return Wishes(
        cluster_name=check_cluster_name(name),
        partitions=partitions,
        account=account,
        qos=answers["qos"] or os.environ.get("SBATCH_QOS", ""),
        head=cast("Literal['slurm', 'login_node']", head.replace("-", "_")),
        time_s=_seconds("--time", time),
        head_time_s=_seconds("--head-time", answers["head_time"]),
        max_workers=answers["max_workers"],
        setup=setup,
    )


def _settings(answers: dict[str, Any], *, for_site: bool) -> dict[str, tuple[Any, str]]:
    """Return what the options say of ``provider.slurm``, each with one line on it."""
    ports = {"services": answers["service_ports"], "workers": answers["worker_ports"]}
    values = {
        "state_dir": (answers["state_dir"], "login and compute nodes must share it"),
        "slurm_bin": (answers["slurm_bin"], "where sbatch and the others are"),
        "interface": (answers["interface"], "whose address Ray uses"),
        "prologue": (list(answers["setup"]) if for_site else [], "run first in every node"),
        "ports": ({name: value for name, value in ports.items() if value}, "what the firewall lets through"),
    }
    return {name: (value, why) for name, (value, why) in values.items() if value}


def _max_nodes(answers: dict[str, Any], *, for_site: bool) -> int | None:
    """Return how many nodes a cluster may have: as the site file says, or as the one says that is being made."""
    if for_site:
        return cast("int | None", answers["max_nodes"])
    site = read_site()
    return None if site is None else site.limits.max_nodes


def _seconds(option: str, text: str | None) -> int | None:
    if not text:
        return None
    try:
        seconds = parse_time_s(text)
    except ValueError as error:
        raise DeployError(f"{option}: {error}; write for example 04:00:00, 2-00:00:00 or 90 for minutes") from None
    if seconds is None:
        raise DeployError(f"{option}: a limit is needed, such as 04:00:00")
    return seconds


def _output(output: str | None, *, for_site: bool, asks: bool) -> Path:
    if output is not None:
        return Path(output) if output == _STDOUT else Path(output).expanduser()
    if for_site:
        return site_file_to_write()
    if asks:
        return Path(click.prompt("File", default="ray-slurm.yaml", err=True)).expanduser()
    return Path("ray-slurm.yaml")


def _tell_site(survey: Survey) -> None:
    memory = "memory is handed out to jobs" if survey.memory_tracked else "memory is not handed out to jobs"
    click.echo(f"SLURM {survey.version}, cluster {survey.cluster}: {memory}", err=True)
    for partition in survey.partitions:
        limit = "no time limit" if partition.max_time_s is None else f"at most {format_time(partition.max_time_s)}"
        nodes = sum(len(kind.names) for kind in partition.kinds)
        state = f"left out: {partition.closed}" if partition.closed else f"{nodes} nodes, {limit}"
        click.echo(f"  {partition.name}{' (default)' if partition.is_default else ''}: {state}", err=True)
    if survey.accounts:
        click.echo(f"  your accounts: {', '.join(survey.accounts)}", err=True)


def _tell_types(made: Deployment) -> None:
    for worker in (made.proposal.heads[0], *made.proposal.workers):
        options = " ".join(f"{name}={option.value}" for name, option in worker.sbatch.items())
        click.echo(f"  {worker.name}: {options or worker.about}", err=True)
