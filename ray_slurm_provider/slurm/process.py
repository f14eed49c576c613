"""The one door to the SLURM tools: runs an argument list, never a shell string."""

import logging
import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ray_slurm_provider.errors import SlurmError, SlurmNotFound, SlurmUnavailable
from ray_slurm_provider.files import is_gone

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S = 60.0

# SBATCH_* silently beats the #SBATCH lines, SQUEUE_* changes what squeue prints, and the
# SLURM_* of a job that submits another leaks limits into it (sbatch(1), INPUT ENVIRONMENT VARIABLES).
_SCRUBBED_PREFIXES = ("SLURM_", "SBATCH_", "SRUN_", "SQUEUE_", "SCANCEL_", "SALLOC_", "SLURMD_", "SINFO_")
_KEPT = frozenset({"SLURM_CONF", "SLURM_CLUSTERS"})

# Stands in stderr when the answer is "could not ask" and not "no".
_UNAVAILABLE_SIGNS = (
    "Unable to contact slurm controller",
    "Socket timed out",
    "Connection refused",
    "connect failure",
    "Protocol authentication error",
    "authentication error",
    "Munge encode failed",
    "Transport endpoint is not connected",
    "Zero Bytes were transmitted or received",
    "Slurm backup controller in standby mode",
    "Resource temporarily unavailable",
    "Slurm temporarily unable to accept job",
)

_NO_CONFIGURATION_SIGNS = ("failed to fetch config", "Could not establish a configuration source")

_CLIENT_PACKAGES = "slurm-client"


class Completed(NamedTuple):
    """A tool that has ended."""

    argv: tuple[str, ...]  # the command line
    stdout: str  # what it printed
    stderr: str  # what it complained about


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without what would change the meaning of a SLURM command."""
    return {name: value for name, value in environ.items() if name in _KEPT or not name.startswith(_SCRUBBED_PREFIXES)}


class SlurmTools(NamedTuple):
    """Where the tools are, and how long each may take."""

    bin_dir: str = ""  # directory of the tools; empty means PATH
    timeout_s: float = DEFAULT_TIMEOUT_S  # seconds after which a tool that has not answered is ended
    environ: Mapping[str, str] = os.environ  # the environment to run in; it is scrubbed before use
    cluster: str = ""  # SLURM's name of the cluster, where the tools speak to several; empty for their own
    prefix: Sequence[str] = ()  # words before each command line, for tools that run in another place

    def __repr__(self) -> str:
        return f"SlurmTools({self.bin_dir!r}, {self.cluster!r})"

    def run(self, argv: Sequence[str], *, stdin: str = "", environ: Mapping[str, str] | None = None) -> Completed:
        """Run one tool and wait for it.

        Args:
            argv: Tool name and its arguments.
            stdin: Text for its standard input.
            environ: Environment in place of the usual one; scrubbed like it.

        Returns:
            What it printed, when it ended with exit code 0.

        Raises:
            SlurmNotFound: The tool or the file that SLURM_CONF names does not exist.
            SlurmUnavailable: It gave no answer in time, or says that it could reach nobody.
            SlurmError: It failed for another reason.
        """
        env = clean_environment(self.environ if environ is None else environ)
        if self.cluster:
            env["SLURM_CLUSTERS"] = self.cluster
        # Unless told otherwise, squeue cuts the list of an array's elements to 64 characters.
        env["SLURM_BITSTR_LEN"] = "0"
        command = (*self.prefix, self.path_of(argv[0]), *argv[1:])
        _require_configuration(command, env)
        started = time.monotonic()
        try:
            done = subprocess.run(
                command,
                input=stdin.encode(errors="surrogateescape"),
                capture_output=True,
                timeout=self.timeout_s,
                env=env,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise SlurmUnavailable(
                argv, None, os.fsdecode(error.stdout or b""), f"no answer in {self.timeout_s:g} s"
            ) from error
        except OSError as error:
            raise SlurmNotFound(argv, None, "", str(error)) from error
        logger.debug("%s took %.3f s, exit code %d", argv, time.monotonic() - started, done.returncode)
        completed = Completed(tuple(argv), os.fsdecode(done.stdout), os.fsdecode(done.stderr))
        if done.returncode != 0:
            raise _failure(completed, done.returncode)
        return completed

    def path_of(self, tool: str) -> str:
        found = shutil.which(tool, path=self.bin_dir or os.pathsep.join(os.get_exec_path(self.environ)))
        if found is not None:
            return found
        where = f"in {self.bin_dir}" if self.bin_dir else "on PATH"
        advice = f"Debian and Ubuntu have it in the package {_CLIENT_PACKAGES}; elsewhere set slurm_bin."
        raise SlurmNotFound([tool], None, "", f"{tool} is not {where}", advice)


def _require_configuration(argv: Sequence[str], env: Mapping[str, str]) -> None:
    # With a SLURM_CONF that does not exist every tool retries for 59 s (measured, 22.05).
    conf = env.get("SLURM_CONF")
    if conf and is_gone(Path(conf)):
        raise SlurmNotFound(argv, None, "", f"SLURM_CONF names {conf}, which does not exist")


def _failure(done: Completed, code: int) -> SlurmError:
    if any(sign in done.stderr for sign in _NO_CONFIGURATION_SIGNS):
        advice = 'This machine knows no SLURM. Is SLURM_CONF set? For a sandbox: eval "$(ray-slurm sandbox env)"'
        return SlurmNotFound(done.argv, code, done.stdout, done.stderr, advice)
    unavailable = any(sign in done.stderr for sign in _UNAVAILABLE_SIGNS)
    kind = SlurmUnavailable if unavailable else SlurmError
    return kind(done.argv, code, done.stdout, done.stderr)
