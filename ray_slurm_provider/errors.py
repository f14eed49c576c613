"""What can go wrong, as a tree.

::

    SlurmProviderError
      ConfigError          a mistake in the YAML: where, what, what is allowed
        SiteRuleError        a rule of the site does not allow it
      SlurmError           a SLURM tool failed: argv, exit code, both streams
        SlurmNotFound        the tool or the SLURM configuration is missing here
        SlurmUnavailable     the controller or munge did not answer; try again
          SubmitUnanswered     sbatch failed, and the job may exist all the same
        SubmitRejected       sbatch was refused; says in which category
        SlurmParseError      the tool answered something that we cannot read
      LaunchDelayed        nothing of a node type is submitted now; says why
      StateError           the cluster directory cannot be read or written
      NodeNotFound         a node id that this cluster does not know
      HeadFailed           the head's job ended before Ray answered
      DeployError          no cluster YAML can be made for this site
      SandboxError         the sandbox could not be started or stopped

The first line of a message says what happened, the following ones what to do.
"""

from collections.abc import Sequence


class SlurmProviderError(Exception):
    """Root of everything this package raises on purpose."""

    # A word for Ray when it hinders a launch; NodeLaunchException takes 19 characters.
    launch_category = "slurm-provider"


class ConfigError(SlurmProviderError):
    """A mistake in the cluster YAML.

    Args:
        path: Where, as a YAML path: ``provider.slurm.state_dir``.
        problem: What is wrong there.
        allowed: What would be right; may be empty.
    """

    def __init__(self, path: str, problem: str, allowed: str = "") -> None:
        self.path = path
        self.problem = problem
        self.allowed = allowed
        super().__init__(f"{path}: {problem}" + (f"\n  allowed: {allowed}" if allowed else ""))


class SiteRuleError(ConfigError):
    """A rule of the site, named with the site and its file, does not allow what a cluster YAML asks for."""

    def __init__(self, path: str, problem: str, rule: str, allowed: str = "", contact: str = "") -> None:
        self.rule = rule
        super().__init__(path, f"{problem}: {rule}", allowed)
        if contact:
            self.args = (f"{self.args[0]}\n  questions: {contact}",)


class SlurmError(SlurmProviderError):
    """A SLURM tool failed; its return code is None when it did not end by itself."""

    launch_category = "slurm-unavailable"

    def __init__(
        self,
        argv: Sequence[str],
        returncode: int | None,
        stdout: str = "",
        stderr: str = "",
        advice: str = "",
    ) -> None:
        self.argv = list(argv)
        self.returncode = returncode
        self.stdout = stdout
        self.stderr = stderr
        self.advice = advice
        super().__init__(self._message())

    @property
    def complaint(self) -> str:
        """What the tool complained about as one line: the site's own plugins speak first, SLURM last."""
        return "; ".join(line.strip() for line in self.stderr.splitlines() if line.strip()) or str(self)

    def _message(self) -> str:
        said = self.stderr.strip() or self.stdout.strip() or "no output"
        code = "did not end" if self.returncode is None else f"exit code {self.returncode}"
        if self.returncode is not None and self.returncode < 0:
            code = f"signal {-self.returncode}"
        text = f"{self.argv[0] if self.argv else 'SLURM'} failed ({code}): {said}"
        return f"{text}\n  {self.advice}" if self.advice else text


class SlurmNotFound(SlurmError):
    """The tool, or the SLURM configuration, does not exist on this machine."""


class SlurmUnavailable(SlurmError):
    """The controller or munge did not answer: nothing is known, ask again later."""


class SubmitUnanswered(SlurmUnavailable):
    """Sbatch failed without a known refusal: the job may exist, with this launch token."""

    launch_category = "slurm-unanswered"
    token = ""

    @classmethod
    def after(cls, error: SlurmError) -> "SubmitUnanswered":
        advice = "SLURM may have taken the job all the same; if squeue shows it later, it is used"
        return cls(error.argv, error.returncode, error.stdout, error.stderr, advice)


class SubmitRejected(SlurmError):
    """Sbatch was refused; the category is a short word for the reason."""

    def __init__(self, argv: Sequence[str], returncode: int | None, stdout: str, stderr: str, category: str) -> None:
        self.category = category
        self.launch_category = f"slurm-{category}"[:19]
        super().__init__(argv, returncode, stdout, stderr)

    @property
    def not_now(self) -> bool:
        """Whether SLURM may take the same job a little later: there are too many in the queue."""
        return self.category == "limit"


class SlurmParseError(SlurmError):
    """The tool printed something that we cannot read: nothing is known."""


class LaunchDelayed(SlurmProviderError):
    """Not all of what was wanted of a node type is submitted now, but `allowed` of it; says why, and what ends it."""

    def __init__(self, category: str, reason: str, allowed: int = 0) -> None:
        self.launch_category = category
        self.allowed = allowed
        super().__init__(reason)


class StateError(SlurmProviderError):
    """The cluster directory cannot be read or written."""


class NodeNotFound(SlurmProviderError):
    """A node id that this cluster does not know."""


class HeadFailed(SlurmProviderError):
    """The head's job ended, or cannot start, before Ray answered there."""


class DeployError(SlurmProviderError):
    """No cluster YAML can be made for this site, or not where it was wanted."""


class SandboxError(SlurmProviderError):
    """The sandbox could not be started, found or stopped."""
