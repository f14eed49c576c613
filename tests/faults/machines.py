"""A sandbox whose nodes are virtual machines out of namespaces, and the faults that they and slurmctld can have.

Each machine has its own network, host name, /dev/shm and processes. The machine ``login`` holds slurmctld, people's
commands and the bridge that joins all of them; its processes are those of this host. Nothing of the host's own network
is touched, and there is no way out of these networks. Without root all of it happens in one user namespace, and what
runs on a machine goes through a second one in which it has its own user id again (user_namespaces(7), nsenter(1),
ip-link(8)).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import zlib
from dataclasses import replace
from pathlib import Path

from ray_slurm_provider import procfs
from ray_slurm_provider.errors import SandboxError
from ray_slurm_provider.sandbox import daemons
from ray_slurm_provider.sandbox.lifecycle import Sandbox

LOGIN = "login"
LOGIN_ADDRESS = "10.77.0.1"
MACHINE_VARIABLE = "RAY_SLURM_SANDBOX_MACHINE"
NODE_FAULTS = ("cut", "join", "crash", "boot")
CONTROLLER_FAULTS = {
    "stop": signal.SIGTERM,
    "crash": signal.SIGKILL,
    "freeze": signal.SIGSTOP,
    "thaw": signal.SIGCONT,
    "start": None,
}
# Separate machines are really lost, and soon: a node that does not answer is DOWN after about 11 s.
_SETTINGS = {
    "SlurmctldHost": f"{LOGIN}({LOGIN_ADDRESS})",
    "CommunicationParameters": "",
    "SlurmdTimeout": 5,
    "MessageTimeout": 3,
    "TCPTimeout": 2,
}
_TOOLS = ("unshare", "nsenter", "ip", "mount", "hostname")
_SCRIPT = Path(__file__).with_name("machine.sh")
_BRIDGE = "br0"
_START_S = 10.0
_STOP_S = 20.0
_TOOL_S = 20.0


class MachineSandbox(Sandbox):
    """A sandbox of machines."""

    @property
    def machines(self):
        return Machines(self.paths, self._daemon_environment())

    def up(self, spec):
        missing = [tool for tool in _TOOLS if shutil.which(tool, path=_search_path()) is None]
        if missing:
            raise SandboxError(f"{', '.join(missing)} not found: apt-get install iproute2")
        super().up(spec.model_copy(update={"settings": {**_SETTINGS, **spec.settings}}))

    def prefix(self, node=LOGIN):
        return self.machines.command(node, [])

    def virtual_nodes(self, spec, base_port):
        nodes = super().virtual_nodes(spec, base_port)
        return [replace(one, host=one.name, address=one.address.replace("127.0.", "10.77.")) for one in nodes]

    def start_controller(self, *options):
        if not self.machines.alive(LOGIN):
            self.machines.up({node.name: node.address for node in self.nodes().values()})
        super().start_controller(*options)

    def _end_processes(self):
        super()._end_processes()
        self.machines.down()

    def controller_fault(self, fault, *, forget_jobs=False):
        """Stop slurmctld in order, crash it (kill -9), freeze it (it takes connections and does not answer), thaw or
        start it; with ``forget_jobs`` without any memory of jobs."""
        running = [process for process in daemons.processes_of(self.paths) if process.name == "slurmctld"]
        if bool(running) == (fault == "start"):
            raise SandboxError(f"slurmctld {'runs already' if running else 'does not run'}")
        if fault == "start":
            self.start_controller("-c" if forget_jobs else "-i")
            return
        procfs.send(running, CONTROLLER_FAULTS[fault])
        if fault == "stop":
            # One that is frozen hears nothing.
            procfs.send(running, signal.SIGCONT)
        if fault in {"stop", "crash"}:
            _wait_for_end(running, "slurmctld")

    def node_fault(self, name, fault):
        """Cut the network of a node, join it again, crash it (all its processes die at once), or boot it."""
        nodes = self.nodes()
        if name not in nodes:
            raise SandboxError(f"there is no node {name}; there are {', '.join(nodes)}")
        actions = {"cut": self.machines.cut, "join": self.machines.join, "crash": self._crash, "boot": self._boot}
        actions[fault](name)

    def _crash(self, name):
        found = self._processes_on(name)
        if not found:
            raise SandboxError(f"{name} does not run")
        self.machines.crash(name)
        procfs.send(found, signal.SIGKILL)
        _wait_for_end(found, name)

    def _boot(self, name):
        if name in daemons.served_nodes(self.paths):
            raise SandboxError(f"{name} runs already")
        if not self.machines.alive(name):
            self.machines.boot(name, self.nodes()[name].address)
        self.start_node(name)

    def _processes_on(self, name):
        """slurmd and the processes of the jobs on a node."""
        found = []
        for process in daemons.processes_of(self.paths):
            words = process.read("cmdline").split(b"\0")
            variables = process.read("environ").split(b"\0")
            if (process.name == "slurmd" and name.encode() in words) or f"SLURMD_NODENAME={name}".encode() in variables:
                found.append(process)
        return found


class Machines:
    """The machines of one sandbox."""

    def __init__(self, paths, environ):
        self._paths = paths
        self._environ = dict(environ)
        self._rootless = os.geteuid() != 0

    def up(self, addresses):
        """Start the login machine and the others, whose addresses these are by name."""
        lines = ["127.0.0.1 localhost", f"{LOGIN_ADDRESS} {LOGIN}", *(f"{at} {name}" for name, at in addresses.items())]
        (self._paths.root / "hosts").write_text("\n".join(lines) + "\n")
        if self._rootless and subprocess.run(["unshare", "-U", "-r", "true"], capture_output=True).returncode:
            raise SandboxError("this machine lets nobody but root make user namespaces")
        own = ["-U", "--map-root-user"] if self._rootless else []
        self._start(LOGIN, ["unshare", *own, "--net", "--uts", "--mount", "--propagation", "private"])
        self._ip("link", "set", "lo", "up")
        self._ip("link", "add", _BRIDGE, "type", "bridge")
        self._ip("addr", "add", f"{LOGIN_ADDRESS}/16", "dev", _BRIDGE)
        self._ip("link", "set", _BRIDGE, "up")
        for name, address in addresses.items():
            self.boot(name, address)

    def down(self):
        procfs.end(self.members(), _STOP_S)

    def boot(self, name, address):
        """Start a machine and connect it."""
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

    def cut(self, name):
        """Take a machine off the network."""
        self._ip("link", "set", _port(name), "down")

    def join(self, name):
        """Bring it back."""
        self._ip("link", "set", _port(name), "up")

    def crash(self, name):
        """End a machine and everything on it at once."""
        procfs.send([self._first(name)], signal.SIGKILL)

    def alive(self, name):
        return self._find(name) is not None

    def command(self, name, words, directory="/"):
        """What runs a command on a machine, as this very user."""
        spaces = ["--net", "--uts", "--mount"] + (["--ipc", "--pid"] if name != LOGIN else [])
        if not self._rootless:
            return [*self._enter(name, *spaces), f"--wdns={directory}", "--", *words]
        back = ["unshare", "-U", f"--map-user={os.geteuid()}", f"--map-group={os.getegid()}", "--"]
        return [*self._enter(name, "-U", "--preserve-credentials", *spaces), f"--wdns={directory}", "--", *back, *words]

    def _enter(self, name, *spaces):
        return ["nsenter", "--target", str(self._first(name).pid), *spaces]

    def _ip(self, *words, machine=LOGIN):
        spaces = ["-U", "--preserve-credentials", "--net"] if self._rootless else ["--net"]
        command = [*self._enter(machine, *spaces), shutil.which("ip", path=_search_path()), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TOOL_S)
        if done.returncode:
            raise SandboxError(f"{' '.join(command)}: {done.stderr.strip()}")

    def _start(self, name, unshare):
        ready = self._paths.root / "run" / f"{name}.ready"
        ready.unlink(missing_ok=True)
        log = self._paths.logs / f"machine.{name}.log"
        with log.open("ab") as file:
            child = subprocess.Popen(
                [*unshare, "bash", str(_SCRIPT), name, str(self._paths.root), "no" if name == LOGIN else "yes"],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                env={**self._environ, MACHINE_VARIABLE: name},
            )
        if not procfs.wait_until(lambda: ready.exists() or child.poll() is not None, _START_S) or not ready.exists():
            raise SandboxError(f"the machine {name} did not start: {log.read_text(errors='replace').strip()}")

    def _first(self, name):
        found = self._find(name)
        if found is None:
            raise SandboxError(f"the machine {name} does not run")
        return found

    def _find(self, name):
        """The first process of a machine: the script itself, not what is around it."""
        wanted = {f"{MACHINE_VARIABLE}={name}".encode(), self._sign}
        bashes = (process for process in procfs.processes() if process.name == "bash")
        return next((process for process in bashes if wanted <= _variables(process)), None)

    def members(self):
        """The processes that make the machines."""
        found = ((process, _variables(process)) for process in procfs.processes())
        return [one for one, says in found if self._sign in says and any(map(_names_machine, says))]

    @property
    def _sign(self):
        return f"SLURM_CONF={self._paths.slurm_conf}".encode()


def _variables(process):
    return set(process.read("environ").split(b"\0"))


def _names_machine(variable):
    return variable.startswith(f"{MACHINE_VARIABLE}=".encode())


def _wait_for_end(processes, name):
    if not procfs.wait_until(lambda: not any(map(procfs.alive, processes)), _STOP_S):
        raise SandboxError(f"{name} has not ended after {_STOP_S:g} s")


def _port(name):
    # A name of any length would not fit: at most 15 characters (IFNAMSIZ).
    return f"p-{zlib.crc32(name.encode()):08x}"


def _search_path():
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
