"""Virtual machines out of namespaces: each has its own network, host name, /dev/shm and processes.

The machine ``login`` holds slurmctld, people's commands and the bridge that joins all of them; its processes are
those of this host. Nothing of the host's own network is touched, and there is no way out of these networks. Without
root all of it happens in one user namespace, and what runs on a machine goes through a second one in which it has its
own user id again (user_namespaces(7), nsenter(1), ip-link(8)).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import zlib
from importlib import resources
from typing import TYPE_CHECKING

from ray_slurm_provider import procfs
from ray_slurm_provider.errors import SandboxError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from ray_slurm_provider.sandbox.layout import SandboxPaths

LOGIN = "login"
LOGIN_ADDRESS = "10.77.0.1"
MACHINE_VARIABLE = "RAY_SLURM_SANDBOX_MACHINE"
TOOLS = ("unshare", "nsenter", "ip", "mount", "hostname")
PACKAGES = "iproute2"
_BRIDGE = "br0"
_START_S = 10.0
_TOOL_S = 20.0


class Machines:
    """The machines of one sandbox.

    Args:
        paths: Its files.
        environ: The environment of the machines' first processes.
    """

    def __init__(self, paths: SandboxPaths, environ: Mapping[str, str]) -> None:
        self._paths = paths
        self._environ = dict(environ)
        self._rootless = os.geteuid() != 0

    def up(self, addresses: Mapping[str, str]) -> None:
        """Start the login machine and the others.

        Args:
            addresses: The other machines' addresses by name.

        Raises:
            SandboxError: The kernel does not allow it, or a tool is missing.
        """
        lines = ["127.0.0.1 localhost", f"{LOGIN_ADDRESS} {LOGIN}", *(f"{at} {name}" for name, at in addresses.items())]
        (self._paths.root / "hosts").write_text("\n".join(lines) + "\n")
        if (
            self._rootless
            and subprocess.run(["unshare", "-U", "-r", "true"], capture_output=True, check=False).returncode
        ):
            raise SandboxError(
                "this machine lets nobody but root make user namespaces; use a sandbox without --isolated"
            )
        own = ["-U", "--map-root-user"] if self._rootless else []
        self._start(LOGIN, ["unshare", *own, "--net", "--uts", "--mount", "--propagation", "private"])
        self._ip("link", "set", "lo", "up")
        self._ip("link", "add", _BRIDGE, "type", "bridge")
        self._ip("addr", "add", f"{LOGIN_ADDRESS}/16", "dev", _BRIDGE)
        self._ip("link", "set", _BRIDGE, "up")
        for name, address in addresses.items():
            self.boot(name, address)

    def boot(self, name: str, address: str) -> None:
        """Start a machine and connect it.

        Raises:
            SandboxError: It runs already, or does not start.
        """
        if self.alive(name):
            raise SandboxError(f"{name} runs already")
        spaces = ["--net", "--uts", "--mount", "--ipc", "--pid", "--propagation", "private"]
        into = self._enter(LOGIN, "-U", "--preserve-credentials") if self._rootless else []
        self._start(name, [*into, "unshare", *spaces, "--fork", "--kill-child"])
        self._ip(
            "link", "add", _port(name), "type", "veth", "peer", "name", "eth0", "netns", str(self._first(name).pid)
        )
        self._ip("link", "set", _port(name), "master", _BRIDGE, "up")
        for words in (
            ("link", "set", "lo", "up"),
            ("addr", "add", f"{address}/16", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
        ):
            self._ip(*words, machine=name)

    def cut(self, name: str) -> None:
        """Take a machine off the network."""
        self._ip("link", "set", _port(name), "down")

    def join(self, name: str) -> None:
        """Bring it back."""
        self._ip("link", "set", _port(name), "up")

    def crash(self, name: str) -> None:
        """End a machine and everything on it at once."""
        procfs.send([self._first(name)], signal.SIGKILL)

    def alive(self, name: str) -> bool:
        """Tell whether a machine runs."""
        return self._find(name) is not None

    def command(self, name: str, words: Sequence[str], directory: str = "/") -> list[str]:
        """Return what runs a command on a machine, as this very user.

        Raises:
            SandboxError: The machine does not run.
        """
        spaces = ["--net", "--uts", "--mount"] + (["--ipc", "--pid"] if name != LOGIN else [])
        if not self._rootless:
            return [*self._enter(name, *spaces), f"--wdns={directory}", "--", *words]
        back = ["unshare", "-U", f"--map-user={os.geteuid()}", f"--map-group={os.getegid()}", "--"]
        return [*self._enter(name, "-U", "--preserve-credentials", *spaces), f"--wdns={directory}", "--", *back, *words]

    def _enter(self, name: str, *spaces: str) -> list[str]:
        return ["nsenter", "--target", str(self._first(name).pid), *spaces]

    def _ip(self, *words: str, machine: str = LOGIN) -> None:
        spaces = ["-U", "--preserve-credentials", "--net"] if self._rootless else ["--net"]
        self._run([*self._enter(machine, *spaces), _ip_path(), *words])

    def _start(self, name: str, unshare: Sequence[str]) -> None:
        ready = self._paths.root / "run" / f"{name}.ready"
        ready.unlink(missing_ok=True)
        script = str(resources.files("ray_slurm_provider").joinpath("scripts/machine.sh"))
        devices = "no" if name == LOGIN else "yes"
        with self._log(name).open("ab") as log:
            child = subprocess.Popen(
                [*unshare, "bash", script, name, str(self._paths.root), devices],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**self._environ, MACHINE_VARIABLE: name},
            )
        if not procfs.wait_until(lambda: ready.exists() or child.poll() is not None, _START_S) or not ready.exists():
            raise SandboxError(
                f"the machine {name} did not start: {self._log(name).read_text(errors='replace').strip()}"
            )

    def _log(self, name: str) -> Path:
        return self._paths.logs / f"machine.{name}.log"

    def _run(self, command: Sequence[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TOOL_S, check=False)
        if done.returncode:
            raise SandboxError(f"{' '.join(command)}: {done.stderr.strip()}")

    def _first(self, name: str) -> procfs.Process:
        found = self._find(name)
        if found is None:
            raise SandboxError(f"the machine {name} does not run")
        return found

    def _find(self, name: str) -> procfs.Process | None:
        """Return the first process of a machine: the script itself, not what is around it."""
        wanted = {f"{MACHINE_VARIABLE}={name}".encode(), f"SLURM_CONF={self._paths.slurm_conf}".encode()}
        return next((p for p in _named("bash") if wanted <= set(p.read("environ").split(b"\0"))), None)


def _named(name: str) -> Iterable[procfs.Process]:
    return (process for process in procfs.processes() if process.name == name)


def _port(name: str) -> str:
    # A name of any length would not fit: at most 15 characters (IFNAMSIZ).
    return f"p-{zlib.crc32(name.encode()):08x}"


def _ip_path() -> str:
    return shutil.which("ip", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") or "ip"
