"""The ssh command with which a laptop reaches a cluster through the login node."""

import shlex
import socket

from ray_slurm_provider.reports import NodeReport, bracketed

DASHBOARD_PORT, CLIENT_PORT = 8265, 10001


def full_host_name() -> str:
    """Return this host's name as others may know it; some hosts resolve their own to localhost."""
    name = socket.getfqdn()
    return socket.gethostname() if name.startswith("localhost") else name


def tunnel_command(report: NodeReport, user: str, login_host: str, *, dashboard_on_loopback: bool) -> str:
    """Return a line for a shell on a laptop, which knows the login node by ``login_host``.

    Without a token only the head's own host sees the dashboard: ``dashboard_on_loopback``.
    """
    target = f"{user}@{login_host}"
    jump: list[str] = []
    dashboard = report.address
    if dashboard_on_loopback:
        dashboard = "127.0.0.1"
        if report.slurm_node:
            jump, target = ["-J", target], f"{user}@{report.host}"
    forwards = [
        word
        for local, host, remote in (
            (DASHBOARD_PORT, dashboard, report.ports["dashboard"]),
            (CLIENT_PORT, report.address, report.ports["client"]),
        )
        for word in ("-L", f"{local}:{bracketed(host)}:{remote}")
    ]
    return shlex.join(["ssh", "-N", *jump, *forwards, target])
