"""From a launch to the script of its node."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ray_slurm_provider.agent.spec import AgentSpec
from ray_slurm_provider.backends.base import Launch
from ray_slurm_provider.batch_script import JobSpec, render, render_process
from ray_slurm_provider.birth_certificate import BirthCertificate, new_token
from ray_slurm_provider.config import ResolvedNode
from ray_slurm_provider.errors import ConfigError
from ray_slurm_provider.site_file import check_node_config, rules_in_force
from ray_slurm_provider.slurm.process import clean_environment

# What belongs to the shell or the node of `ray up` and must not follow the job to another.
_NOT_FOR_JOBS = (
    "RAY_",
    "AUTOSCALER_",
    "CUDA_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "PMI_",
    "PMIX_",
    "TMPDIR",
)


def new_certificate(launch: Launch, token: str = "") -> BirthCertificate:
    """Return the birth certificate of a launch, with a token of its own when none is given."""
    tags = {str(name): str(value) for name, value in launch.tags.items()}
    return BirthCertificate(launch.cluster, launch.home, token or new_token(), launch.head, tags)


def job_spec(launch: Launch, certificate: BirthCertificate, count: int = 1) -> JobSpec:
    settings, resolved = launch.settings, launch.config.resolved or ResolvedNode()
    _check_rules(launch)
    python = settings.python or ("" if resolved.steps else settings.default_python or "")
    on_path = settings.python or settings.default_python
    in_file = settings.birth_record == "file"
    # scontrol prints a job's name among other Key=Value pairs, in no quotes.
    name = f"ray-{launch.cluster}-{launch.node_type}".translate(str.maketrans(" =", "__"))
    skip = [*settings.sbatch_skip, *launch.config.sbatch_skip]
    if in_file and {"job_name", "job-name"} & set(skip):
        raise ConfigError("sbatch_skip", "job_name cannot be left out: with birth_record: file jobs are known by it")
    return JobSpec(
        job_name=f"{name}-{certificate.token}" if in_file else name,
        comment="" if in_file else certificate_text(launch, certificate),
        token=certificate.token,
        count=count,
        node_type=launch.node_type,
        cluster_dir=launch.cluster_dir,
        options=launch.config.sbatch,
        skip=skip,
        avoid=[] if launch.config.sbatch.nodelist else list(launch.avoid),
        extra=[*settings.sbatch_extra, *launch.config.sbatch_extra],
        steps=[(where, command) for where, command in resolved.steps],
        env=launch.config.env,
        python=str(Path(python).expanduser()) if python else "",
        path_prefix=str(Path(on_path).expanduser().parent) if on_path else "",
        wait_for_go=not launch.head,
        # A head that drains ends every workload: it works to the last second.
        drain_s=settings.drain_s if launch.head else 0,
        agent=_agent_spec(launch, resolved).as_json(),
    )


def _check_rules(launch: Launch) -> None:
    """Refuse what the site does not allow, whatever the YAML was on its way here."""
    rules = rules_in_force(launch.settings)
    if rules is not None:
        path = f"available_node_types.{launch.node_type}.node_config"
        check_node_config(rules, launch.settings, launch.config, path)


def certificate_text(launch: Launch, certificate: BirthCertificate) -> str:
    try:
        return certificate.text()
    except ValueError as error:
        path = f"available_node_types.{launch.node_type}"
        raise ConfigError(path, str(error), "a shorter cluster or type name") from error


def canary_script(launch: Launch, token: str) -> str:
    """Return the script of a job that only looks around (`agent/canary.py`), otherwise like the node's."""
    spec = job_spec(launch, new_certificate(launch, token))
    return render(replace(spec, module="ray_slurm_provider.agent.canary", wait_for_go=False, drain_s=0))


def preview_script(launch: Launch) -> str:
    """Return the script that a backend would run, with a token that nobody uses."""
    spec = job_spec(launch, new_certificate(launch, "TOKEN"))
    return render_process(spec, "HOST") if launch.config.placement == "login_node" else render(spec)


def job_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment that a job starts with, from that of `ray up`."""
    return {name: value for name, value in clean_environment(environ).items() if not name.startswith(_NOT_FOR_JOBS)}


def _agent_spec(launch: Launch, resolved: ResolvedNode) -> AgentSpec:
    """Return what the agent is told; settings of the same name go to it as they are."""
    names = set(AgentSpec._fields) & set(type(launch.settings).model_fields)
    shared = {name: value for name in names if (value := getattr(launch.settings, name)) is not None}
    return AgentSpec(
        cluster=launch.cluster,
        home=launch.home,
        cluster_dir=str(launch.cluster_dir),
        login_node=launch.config.placement == "login_node",
        head=launch.head,
        gcs_address=launch.gcs_address,
        resources=dict(resolved.resources),
        written=list(resolved.written),
        labels=dict(resolved.labels),
        service_ports=launch.settings.ports.services or "",
        worker_ports=launch.settings.ports.workers or "",
        ray_start_args=list(launch.config.ray_start_args),
        **shared,
    )
