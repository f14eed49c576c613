"""How people and programs get at a cluster that is up: its address, its token, certificates for this host."""

import os
import tempfile
from pathlib import Path

from ray_slurm_provider import tls
from ray_slurm_provider.agent.network import connection_state, own_addresses
from ray_slurm_provider.agent.ray_command import CONNECTION_ENVIRONMENT, access_environment
from ray_slurm_provider.backends.login_process import host_name
from ray_slurm_provider.cluster import Cluster
from ray_slurm_provider.errors import StateError
from ray_slurm_provider.reports import READY, NodeReport

# Everything by which a process of Ray finds a cluster and is let in.
ACCESS_VARIABLES = frozenset(
    {
        "RAY_ADDRESS",
        "RAY_AUTH_MODE",
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_TOKEN_PATH",
        "RAY_USE_TLS",
        "RAY_TLS_CA_CERT",
        "RAY_TLS_SERVER_CERT",
        "RAY_TLS_SERVER_KEY",
    }
)
_CONNECT_S = 3.0


def access_variables(cluster: Cluster, *, client: bool = False) -> dict[str, str]:
    report = ready_head_report(cluster)
    return {
        "RAY_ADDRESS": report.client_address if client else report.gcs_address,
        **CONNECTION_ENVIRONMENT,
        **access_environment(cluster.directory.root, token_auth=cluster.settings.token_auth),
        **_tls_variables(cluster),
    }


def private_temp_dir() -> dict[str, str]:
    """Return the variables for a TMPDIR that only this user can write to; nothing when there is one, or none can be.

    Ray imports what a cached YAML there names, before we are asked (ray/autoscaler/_private/commands.py,
    _bootstrap_config), and looks for no cache elsewhere.
    """
    present = Path(tempfile.gettempdir()).stat()
    if present.st_uid == os.getuid() and not present.st_mode & 0o022:
        return {}
    try:
        own = Path.home() / ".cache" / "ray-slurm"
        own.mkdir(mode=0o700, parents=True, exist_ok=True)
        own.chmod(0o700)
    except (OSError, RuntimeError):  # no home at all
        return {}
    # Sockets of a Ray that is started by hand would have too long a path there.
    return {"TMPDIR": str(own), "RAY_TMPDIR": os.environ.get("RAY_TMPDIR", "/tmp")}  # noqa: S108 Ray's own choice


def ready_head_report(cluster: Cluster) -> NodeReport:
    """Return what the head of a cluster says of itself; raise `StateError` when none is up."""
    report = cluster.directory.head_report()
    ready = report is not None and report.phase == READY
    if report is None or not ready or _refuses(report):
        raise StateError(
            cluster.lost_directory() or f"cluster {cluster.name} has no head that answers; start it with `ray up`"
        )
    return report


def _refuses(head: NodeReport) -> bool:
    """Tell whether positively nobody listens where a head said that it would; it may have been killed."""
    return connection_state(head.address, head.ports["gcs"], _CONNECT_S) == "refused"


def _tls_variables(cluster: Cluster) -> dict[str, str]:
    if not cluster.settings.tls:
        return {}
    authority = cluster.directory.tls
    own = authority / f"{host_name()}.pem"
    # Made anew each time: the host's addresses may have changed.
    tls.make_certificate(authority, own, own_addresses())
    return tls.tls_environment(authority, own)
