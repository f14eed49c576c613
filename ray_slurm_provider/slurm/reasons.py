"""SLURM's reasons for waiting, in plain words (squeue(1), JOB REASON CODES)."""

from functools import lru_cache

# With --local a federation's job that another cluster has started looks ended (squeue(1), JOB STATE CODES).
ELSEWHERE = "REVOKED"
STARTED_ELSEWHERE = (
    "another cluster of the federation has started the job, where nothing is seen of it: keep jobs on this one, by"
    " --cluster-constraint in sbatch_extra, or ask the site"
)

_WORDS = {
    "AccountNotAllowed": "the partition is not for this account",
    "AssocGrpCpuLimit": "your account has as many CPUs as it may have",
    "AssocGrpGRES": "your account has as many GPUs as it may have",
    "AssocGrpMemLimit": "your account has as much memory as it may have",
    "AssocGrpNodeLimit": "your account has as many nodes as it may have",
    "AssocMaxJobsLimit": "your account runs as many jobs as it may",
    "AssociationJobLimit": "your account runs as many jobs as it may",
    "BadConstraints": "no node fulfils what the job asks for",
    "BeginTime": "its begin time is not reached, or it is being requeued",
    "Cleaning": "it is being requeued, and its last run is still being cleared away",
    "Dependency": "it waits for another job",
    "DependencyNeverSatisfied": "the job it waits for has failed",
    "InvalidAccount": "its account is not valid",
    "InvalidQOS": "its QOS is not valid",
    "JobHeldAdmin": "an administrator holds it",
    "JobHeldUser": "you hold it: scontrol release",
    "Licenses": "it waits for a license",
    "MaxGRESPerAccount": "your account has as many GPUs as it may have",
    "NodeDown": "a node that it needs is down",
    "None": "the scheduler has not looked at it yet",
    "PartitionConfig": "it asks for more than the partition gives",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition takes no jobs to run",
    "PartitionNodeLimit": "it asks for more nodes or CPUs than the partition gives",
    "PartitionTimeLimit": "its time is more than the partition allows",
    "Priority": "other jobs come first",
    "QOSGrpCpuLimit": "the QOS has as many CPUs as it may have",
    "QOSGrpGRES": "the QOS has as many GPUs as it may have",
    "QOSGrpNodeLimit": "the QOS has as many nodes as it may have",
    "QOSJobLimit": "the QOS runs as many jobs as it may",
    "QOSMaxCpuPerUserLimit": "you have as many CPUs as the QOS allows",
    "QOSMaxGRESPerUser": "you have as many GPUs as the QOS allows",
    "QOSMaxJobsPerUserLimit": "you run as many jobs as the QOS allows",
    "QOSMaxNodePerUserLimit": "you have as many nodes as the QOS allows",
    "QOSMaxWallDurationPerJobLimit": "its time is more than the QOS allows",
    "ReqNodeNotAvail": "nodes that it needs are down, drained or reserved",
    "Reservation": "its reservation has not begun",
    "ReservationDeleted": "its reservation is gone",
    "Resources": "it is next, and waits for nodes to become free",
}
# With these a job waits for ever, whatever others do: somebody has to change it, or the site.
_FOR_EVER = frozenset(
    {
        "AccountNotAllowed",
        "BadConstraints",
        "DependencyNeverSatisfied",
        "InvalidAccount",
        "InvalidQOS",
        "PartitionConfig",
        "PartitionNodeLimit",
        "PartitionTimeLimit",
        "QOSMaxWallDurationPerJobLimit",
        "ReservationDeleted",
    }
)


def in_words(reason: str) -> str:
    """Return a reason with what it means; one that we do not know as it is.

    Args:
        reason: As squeue prints it; what follows a comma or a bracket is detail.
    """
    words = _WORDS.get(_name(reason))
    if words is None:
        return reason
    return f"{reason} ({words}; it will never start)" if waits_for_ever(reason) else f"{reason} ({words})"


@lru_cache(maxsize=256)
def waits_for_ever(reason: str) -> bool:
    """Tell whether a job with this reason will never start as it is."""
    return _name(reason) in _FOR_EVER


def _name(reason: str) -> str:
    return reason.partition(",")[0].partition("(")[0].strip()
