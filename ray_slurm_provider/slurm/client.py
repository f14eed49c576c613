"""SLURM as a client whose methods are questions."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping

from ray_slurm_provider.errors import (
    SlurmError,
    SlurmNotFound,
    SlurmParseError,
    SlurmUnavailable,
    SubmitRejected,
    SubmitUnanswered,
)
from ray_slurm_provider.slurm import parse
from ray_slurm_provider.slurm.process import SlurmTools
from ray_slurm_provider.slurm.types import Job, JobEnd, SlurmIdentity

# sbatch's own words, and the category we give them; the first that fits wins.
_REJECTIONS = (
    ("Invalid job array specification", "array"),
    ("Invalid partition name", "partition"),
    ("invalid partition specified", "partition"),
    ("time limit is invalid", "time-limit"),
    ("Invalid --time", "time-limit"),
    ("Invalid account", "account"),
    ("Invalid qos", "qos"),
    ("Invalid generic resource", "gres"),
    ("Invalid feature", "constraint"),
    ("Invalid node name", "node-name"),
    ("reservation is invalid", "reservation"),
    ("Memory specification", "memory"),
    ("Invalid --mem", "memory"),
    ("More processors requested", "cpus"),
    ("node configuration is not available", "no-such-node"),
    ("Node count specification invalid", "node-count"),
    ("Job violates accounting/QOS policy", "policy"),
    ("Access/permission denied", "permission"),
    ("unrecognized option", "option"),
)
# Limits on how many jobs are in the queue, by account, user or QOS: they pass by themselves. They stand before the
# policy that they belong to; those on a job's size or time do not pass.
_SUBMIT_LIMIT = re.compile(r"\b\w*(Max|Grp)Submit\w*")
# The errors of slurm_strerror() with which the controller refuses a job. Other words may also tell of a connection that
# broke after it had taken the job, among them those of the C library ("Invalid argument").
_FAILED = "Batch job submission failed: "
_REFUSALS = re.compile(
    r"Invalid (account|mcs_label|--|user id|group id|.* specifi)|Requested (?!nodes are busy)|Required |"
    r"Access(/permission)? denied|User's group|More processors|Node count|CPU count|Task \w+ specification|"
    r"Memory required|Time limit|Job (violates|dependency|script|size|--batch)|Pathname of|No partition|No eligible|"
    r"Burst Buffer|Insufficient GRES|Duplicate generic|Multiple |Circular|Cannot request|System submissions|Only batch"
)
# What the codes that plugins of sites return mean to SLURM (-1) and to the C library (1); their own words stand before.
_PLUGIN_REFUSALS = re.compile(r"(Unspecified error|Operation not permitted)$", re.MULTILINE)
_WORDS_OF_SITE = re.compile(r"^sbatch: error: (?!slurm_|auth_|munge|$)", re.MULTILINE | re.IGNORECASE)
# With these words sbatch ends before it sends anything.
_NEVER_SENT = re.compile(
    r'^Try "sbatch --help"|^sbatch: (error|fatal): ('
    r"[Ii]nvalid (?!authentication|job credential)|cli_filter plugin terminated|Plugin stack post-option|"
    r"Unable to open|This does not look like a batch script|Batch script (contains|is empty)|.*mutually exclusive)",
    re.MULTILINE,
)
# It reached nobody, or had no credential to send.
_NOT_CONNECTED = re.compile(r"^sbatch: error: .*(\(connect failure\)$|Munge encode failed)", re.MULTILINE)
_SHOWN = {"job": "JobId=", "node": "NodeName="}
# All of what scontrol says of a job or a node that SLURM does not know; a wrapper's "not found" is something else.
_UNKNOWN = re.compile(r"^(slurm_load_jobs error: Invalid job id specified|Node \S+ not found)$", re.MULTILINE)
# An argument list may hold about 2 MB; ids are short, but a cluster may be large.
_CANCEL_BATCH = 1000


class SlurmClient:
    """Asks SLURM, through its command line tools.

    Every method raises `SlurmUnavailable` when nobody answered: then nothing is known.
    """

    def __init__(self, tools: SlurmTools | None = None) -> None:
        self.tools = tools or SlurmTools()

    def jobs(self) -> list[Job]:
        """Return this user's jobs, also the ended ones that the controller remembers (MinJobAge).

        The elements of an array that wait are one row, see `Job.elements`.
        """
        argv = squeue_argv()
        text = self.tools.run(argv).stdout
        try:
            return parse.parse_squeue(text)
        except ValueError as error:
            raise SlurmParseError(argv, 0, text, f"{error}; squeue printed {text[:200]!r}") from error

    def submit(self, script: str, environ: Mapping[str, str] | None = None) -> str:
        """Submit a batch script and return the job's id.

        Args:
            script: The text, with its ``#SBATCH`` lines.
            environ: The environment that the job starts with; ours by default.

        Raises:
            SubmitRejected: SLURM says no.
            SlurmNotFound, SlurmUnavailable: It reached nobody.
            SubmitUnanswered: Anything else. The job may exist all the same: look for it before trying again.
        """
        argv = ["sbatch", "--parsable"]
        try:
            done = self.tools.run(argv, stdin=script, environ=environ)
            return parse.parse_submitted(done.stdout)
        except ValueError as error:
            words = f"{error}: {done.stdout[:200]!r} {done.stderr[:200]}"
            raise SubmitUnanswered.after(SlurmError(argv, 0, done.stdout, words)) from error
        except SlurmNotFound:
            raise
        except SlurmError as error:
            if _is_refusal(error):
                raise _rejected(error) from error
            if _NOT_CONNECTED.search(error.stderr) and "retrying" not in error.stderr:
                raise
            raise SubmitUnanswered.after(error) from error

    def test_submit(self, script: str, environ: Mapping[str, str] | None = None) -> str:
        """Return when and where a job could start, in sbatch's words; nothing is submitted (``--test-only``)."""
        try:
            done = self.tools.run(["sbatch", "--test-only"], stdin=script, environ=environ)
        except (SlurmNotFound, SlurmUnavailable):
            raise
        except SlurmError as error:
            raise _rejected(error) from error
        lines = (done.stderr + done.stdout).splitlines()
        said = next((line for line in lines if "to start at" in line), "sbatch takes it")
        return re.sub(r"^sbatch: Job \d+ ", "could start: ", said).replace("could start: to start", "could start")

    def partitions(self) -> dict[str, dict[str, str]]:
        lines = self.tools.run(["scontrol", "show", "partition", "-o"]).stdout.splitlines()
        shown = [parse.parse_show(line) for line in lines]
        return {facts["PartitionName"]: facts for facts in shown if "PartitionName" in facts}

    def nodes(self) -> list[dict[str, str]]:
        lines = self.tools.run(["scontrol", "show", "node", "-o"]).stdout.splitlines()
        return [facts for line in lines if "NodeName" in (facts := parse.parse_show(line))]

    def federation(self) -> str:
        """Return the name of the federation that the cluster is in, "" when it is in none."""
        shown = self.tools.run(["scontrol", "show", "federation"]).stdout
        found = re.search(r"^Federation:\s*(\S+)", shown, re.MULTILINE)
        return found.group(1) if found else ""

    def configuration(self) -> dict[str, str]:
        return parse.parse_config(self.tools.run(["scontrol", "show", "config"]).stdout)

    def identity(self) -> SlurmIdentity:
        """Return which SLURM answers, as its controller has it configured: the same on every host."""
        config = self.configuration()
        hosts = [value for key, value in sorted(config.items()) if key.startswith("SlurmctldHost")]
        name, port = config.get("ClusterName", ""), config.get("SlurmctldPort", "")
        if not name or not hosts:
            raise SlurmParseError(["scontrol", "show", "config"], 0, "", "scontrol does not show which SLURM this is")
        return SlurmIdentity(name, tuple(f"{host.partition('(')[0]}:{port}" for host in hosts))

    def associations(self, user: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return accounts and QOS of a user by the accounting database, the default account first."""
        ask = ["sacctmgr", "--noheader", "--parsable2", "show"]
        default = self.tools.run([*ask, "user", user, "format=DefaultAccount"]).stdout.split()
        rows = self.tools.run([*ask, "assoc", "where", f"user={user}", "format=Account,QOS"]).stdout.splitlines()
        pairs = [row.split("|", 1) for row in rows if "|" in row]
        accounts = dict.fromkeys([*default, *(account for account, _ in pairs)])
        qos = dict.fromkeys(name for _, names in pairs for name in names.split(",") if name)
        return tuple(accounts), tuple(qos)

    def cancel(self, job_ids: Iterable[str]) -> None:
        """End jobs; one that has ended already, or that nobody knows, is no error."""
        ids = list(grouped(job_ids))
        for start in range(0, len(ids), _CANCEL_BATCH):
            self.tools.run(["scancel", "--quiet", *ids[start : start + _CANCEL_BATCH]])

    def job_end(self, job_id: str) -> JobEnd | None:
        """Return how a job stands by ``scontrol show job``, None when the controller does not know it."""
        text = self._show("job", job_id)
        if text is None:
            return None
        try:
            return parse.parse_job_end(text)
        except ValueError as error:
            raise SlurmParseError(["scontrol", "show", "job"], 0, text, str(error)) from error

    def job_facts(self, job_id: str) -> dict[str, str]:
        return parse.parse_show(self._show("job", job_id) or "")

    def array_facts(self, number: str) -> list[dict[str, str]]:
        """Return the pairs of ``scontrol show job`` for a job, or each part of an array; nothing when it is unknown."""
        records = re.split(r"^(?=JobId=)", self._show("job", number) or "", flags=re.MULTILINE)
        return [facts for record in records if "JobId" in (facts := parse.parse_show(record))]

    def node_address(self, node: str) -> str:
        """Return the NodeAddr of a SLURM node, "" when there is none."""
        return parse.parse_show(self._show("node", node) or "").get("NodeAddr", "")

    def node_addresses(self) -> list[str]:
        return [facts["NodeAddr"] for facts in self.nodes() if facts.get("NodeAddr")]

    def _show(self, what: str, name: str) -> str | None:
        """Return what scontrol shows, None when SLURM says that it does not know it."""
        argv = ["scontrol", "show", what, "-o", name]
        try:
            done = self.tools.run(argv)
        except SlurmUnavailable:
            raise
        except SlurmError as error:
            if error.returncode == 1 and _UNKNOWN.search(f"{error.stdout}\n{error.stderr}"):
                return None
            raise
        if _SHOWN[what] not in done.stdout:
            raise SlurmParseError(argv, 0, done.stdout, f"scontrol does not show the {what}: {done.stdout[:200]!r}")
        return done.stdout

    def answers(self) -> bool:
        """Tell whether the controller answers (``scontrol ping``)."""
        try:
            return bool(re.search(r"\bis UP\b", self.tools.run(["scontrol", "ping"]).stdout))
        except SlurmError:
            return False


def squeue_argv() -> list[str]:
    """Return the one listing question: all of this user's jobs, ended ones too.

    The user is named by number: a user name may be cut or unknown to the controller's host. Without ``--local`` each
    squeue also asks whether there is a federation (REQUEST_FED_INFO, measured with 22.05).
    """
    return [
        "squeue",
        "--local",
        "--user",
        str(os.getuid()),
        "--states",
        "all",
        "--format",
        parse.SQUEUE_FORMAT,
    ]


def grouped(job_ids: Iterable[str]) -> Iterator[str]:
    """Return job ids with the elements of each array as one word: scancel makes one request for each."""
    arrays: dict[str, list[str]] = {}
    for job_id in job_ids:
        number, _, index = job_id.partition("_")
        if index.isdigit():
            arrays.setdefault(number, []).append(index)
        else:
            yield job_id
    for number, indices in arrays.items():
        for start in range(0, len(indices), _CANCEL_BATCH):
            batch = indices[start : start + _CANCEL_BATCH]
            yield f"{number}_[{','.join(batch)}]" if len(batch) > 1 else f"{number}_{batch[0]}"


def _is_refusal(error: SlurmError) -> bool:
    """Tell whether sbatch has certainly submitted nothing."""
    if (error.returncode or 0) <= 0 or _holds_job_id(error.stdout):
        return False
    before, failed, why = error.stderr.rpartition(_FAILED)
    if not failed:
        return bool(_NEVER_SENT.search(error.stderr))
    return bool(_REFUSALS.match(why) or (_PLUGIN_REFUSALS.match(why) and _WORDS_OF_SITE.search(before)))


def _holds_job_id(text: str) -> bool:
    try:
        return bool(parse.parse_submitted(text))
    except ValueError:
        return False


def _rejected(error: SlurmError) -> SubmitRejected:
    category = rejection_category(error.stderr)
    return SubmitRejected(error.argv, error.returncode, error.stdout, error.stderr, category)


def rejection_category(stderr: str) -> str:
    """Return a short word for why sbatch was refused; "limit" when the same job may be taken a little later."""
    if _SUBMIT_LIMIT.search(stderr):
        return "limit"
    return next((category for words, category in _REJECTIONS if words.lower() in stderr.lower()), "refused")
