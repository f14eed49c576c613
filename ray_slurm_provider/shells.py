"""Ways to run a command on a node: in its allocation by srun, by ssh, or on this very host."""

import base64
import contextlib
import os
import secrets
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ray_slurm_provider import procfs
from ray_slurm_provider.errors import StateError
from ray_slurm_provider.slurm.process import clean_environment

# After Ctrl-C in a terminal the command has had the signal as well.
_INTERRUPTED_S = 2.0
_END_S = 5.0


class Shell(Protocol):
    """A way to one node."""

    def command(self, text: str, *, terminal: bool) -> list[str]:
        """Return the command line here that runs a text there with the cluster's environment."""

    def interrupted(self) -> None:
        """End what a command left behind there when its client here was interrupted."""


@dataclass(frozen=True)
class LocalShell:
    """Runs commands on this host."""

    exports: Path  # file of the exports to begin with

    def command(self, text: str, *, terminal: bool) -> list[str]:  # noqa: ARG002 it has the terminal that we have
        return ["bash", "-c", _with_exports(self.exports, text)]

    def interrupted(self) -> None:
        """Nothing is left: what ran here was our child."""


@dataclass(frozen=True)
class SrunShell:
    """Runs commands in a node's allocation, as further steps of its job."""

    exports: Path  # file of the exports to begin with
    srun: str  # path of srun
    job_id: str  # the job
    cluster: str = ""  # SLURM's name of the cluster, where the tools speak to several; "" for their own

    def command(self, text: str, *, terminal: bool) -> list[str]:
        # Unless told otherwise, slurmstepd keeps bytes that end no line (measured, 22.05).
        option = "--pty" if terminal else "--unbuffered"
        return [*self._step(), option, "bash", "-c", _with_exports(self.exports, text)]

    def interrupted(self) -> None:
        """Nothing is left: the step ends with srun."""

    def _step(self) -> list[str]:
        clusters = [f"--clusters={self.cluster}"] if self.cluster else []
        return [
            self.srun,
            *clusters,
            f"--jobid={self.job_id}",
            "--overlap",
            "--nodes=1",
            "--ntasks=1",
            "--quit-on-interrupt",
        ]


@dataclass(frozen=True)
class SshShell:
    """Runs commands on a node's host by ssh."""

    exports: Path  # file of the exports to begin with
    arguments: Sequence[str]  # the arguments of ssh, the host last
    temp_dir: str  # Ray's directory on that host, for a note of what runs
    _token: str = field(default_factory=lambda: secrets.token_hex(4))

    def command(self, text: str, *, terminal: bool) -> list[str]:
        note = f"ps -o pgid= -p $$ >{self._note()}; " if not terminal else ""
        remote = _for_any_login_shell(note + _with_exports(self.exports, text))
        return ["ssh", "-tt" if terminal else "-T", *self.arguments, remote]

    def interrupted(self) -> None:
        """End the command's process group: without a terminal sshd would let it run on."""
        subprocess.run(
            ["ssh", *self.arguments, _for_any_login_shell(f"kill -TERM -- -$(cat {self._note()})")],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )

    def _note(self) -> str:
        return shlex.quote(f"{self.temp_dir}/exec-{self._token}")


def ssh_arguments(host: str, auth: dict[str, str], further: Sequence[str]) -> list[str]:
    result = list(further)
    if auth.get("ssh_private_key"):
        result += ["-i", os.path.expanduser(auth["ssh_private_key"])]  # noqa: PTH111 ssh takes a text
    if auth.get("ssh_proxy_command"):
        result += ["-o", f"ProxyCommand={auth['ssh_proxy_command']}"]
    if auth.get("ssh_user"):
        result += ["-l", auth["ssh_user"]]
    return [*result, host]


def run(shell: Shell, text: str, *, with_output: bool = False, terminal: bool = False) -> tuple[int, str]:
    """Run a command on a node, with our standard streams.

    Returns:
        Its exit code, and what it printed when that was asked for.
    """
    argv = shell.command(text, terminal=terminal)
    environ = clean_environment(os.environ)
    environ.pop("TMPDIR", None)  # a directory of this host, which slurmstepd would make on the other
    try:
        stdout = subprocess.PIPE if with_output else None
        child = subprocess.Popen(argv, env=environ, stdout=stdout, text=True, errors="replace")
    except OSError as error:
        raise StateError(f"{argv[0]}: {error.strerror}") from error
    try:
        output = child.communicate()[0]
    except BaseException:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_INTERRUPTED_S)
        if child.returncode is None:
            here = procfs.find(child.pid)
            procfs.end([*procfs.descendants(child.pid), *([here] if here else [])], _END_S)
            shell.interrupted()
        raise
    # As a shell says it: 128 and the number of the signal.
    return child.returncode if child.returncode >= 0 else 128 - child.returncode, output or ""


def _with_exports(exports: Path, text: str) -> str:
    return f". {shlex.quote(str(exports))} && cd && {{ {text}\n}}"


def _for_any_login_shell(text: str) -> str:
    """Return a command line by which any login shell has bash run a text: csh takes no newline or ``!`` in quotes."""
    encoded = base64.b64encode(os.fsencode(text)).decode()
    return f"""bash -c 't=$(printf %s "$1" | base64 -d) && eval "$t"' bash {encoded}"""
