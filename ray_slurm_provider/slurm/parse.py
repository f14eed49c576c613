"""Text in, types back: what the SLURM tools print and what sbatch options mean. Pure functions."""

import re

from ray_slurm_provider.slurm.types import Job, JobEnd, JobState

SEPARATOR = "\x1f"

# Free text stands last: a newline or a separator inside it cannot move another field.
SQUEUE_FIELDS = ("%i", "%T", "%r", "%P", "%N", "%l", "%e", "%S", "%j", "%k")
SQUEUE_FORMAT = SEPARATOR.join(SQUEUE_FIELDS)
# The first word of squeue's header: the header proves that squeue itself answered.
_HEADER_START = "JOBID" + SEPARATOR + "STATE" + SEPARATOR

_ANY_JOB_ID = re.compile(r"\d+(_(\d+|\[.*\]))?(\+\d+)?$")
_CUT_ARRAY = re.compile(r"\d+_\[[^\]]*$")
_PARSABLE_ID = re.compile(r"(\d+)(?:;\S+)?$")
_NOTHING = dict.fromkeys(("None", "N/A", "(null)", "INVALID", "NOT_SET", "NONE", "Unknown"), "")
# What the state of a SLURM node says when no job can start there (scontrol(1), NODES).
# POWERED_DOWN is not among them: SLURM powers such a node up for a job.
OUT_OF_SERVICE = re.compile(r"\b(?:DOWN|FAIL|FUTURE|NOT_RESPONDING|UNKNOWN|DRAIN)")
# A birth certificate of an older release may hold what looks like a pair: it ends at its brace.
_KEY = r"[A-Z][A-Za-z0-9:/_]*"
_PAIR = re.compile(
    rf'(?:^|\s)({_KEY})=((?<=\sComment=)ray-slurm:\d+:\{{.*?"\}}(?=\s|$)|.*?(?=\s{_KEY}=|\s*$))', re.DOTALL
)
_MIB_PER_UNIT = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024 * 1024}


def parse_squeue(text: str) -> list[Job]:
    """Read the output of ``squeue`` in our format, header first.

    A job name or comment may hold a newline, so a line that is no row of ours is the rest of somebody's
    free text and is skipped.

    Raises:
        ValueError: This is not a complete answer of squeue: no header, or a line cut short.
    """
    if not text.endswith("\n"):
        raise ValueError("the last line is not complete")
    lines = iter(text.split("\n"))
    # A banner may stand before the header; the rows are what is left after it.
    if not any(line.startswith(_HEADER_START) for line in lines):
        raise ValueError("there is no header line")
    return [job for line in lines if (job := _parse_row(line)) is not None]


def _parse_row(line: str) -> Job | None:
    fields = line.split(SEPARATOR, len(SQUEUE_FIELDS) - 1)
    if len(fields) != len(SQUEUE_FIELDS) or not (fields[0].isdigit() or _ANY_JOB_ID.match(fields[0])):
        if len(fields) == len(SQUEUE_FIELDS) and _CUT_ARRAY.match(fields[0]):
            raise ValueError(f"the elements of an array are not all named: {fields[0][-40:]}")
        return None
    job_id, state, reason, partition, nodes, limit, end, start, name, comment = fields
    return Job(
        job_id,
        JobState.of(state),
        _NOTHING.get(reason, reason),
        partition,
        _NOTHING.get(nodes, nodes),
        _NOTHING.get(limit, limit),
        _NOTHING.get(end, end),
        _NOTHING.get(start, start),
        name,
        "" if comment == "(null)" else comment,
    )


def _known(word: str) -> str:
    return _NOTHING.get(word.strip(), word.strip())


def parse_submitted(text: str) -> str:
    """Return the job id from ``sbatch --parsable``; sites print banners before it."""
    for line in reversed(text.splitlines()):
        match = _PARSABLE_ID.match(line.strip())
        if match:
            return match.group(1)
    raise ValueError("no line holds a job id")


def parse_show(text: str) -> dict[str, str]:
    """Return the ``Key=Value`` pairs of ``scontrol show -o``; a value ends before the next key."""
    result: dict[str, str] = {}
    for key, value in _PAIR.findall(text.strip()):
        result.setdefault(key, value.strip())
    return result


def parse_config(text: str) -> dict[str, str]:
    """Return the ``Key = Value`` lines of ``scontrol show config``."""
    pairs = (line.split("=", 1) for line in text.splitlines() if re.match(r"[\w\[\]]+\s*=", line))
    return {key.strip(): value.strip() for key, value in pairs}


def parse_job_end(text: str) -> JobEnd:
    """Read the end of a job from ``scontrol show job -o``."""
    pairs = parse_show(text)
    if "JobState" not in pairs:
        raise ValueError("there is no JobState")
    code, _, signal = pairs.get("ExitCode", "0:0").partition(":")
    return JobEnd(
        state=pairs["JobState"],
        reason=_known(pairs.get("Reason", "")),
        exit_code=int(code) if code.isdigit() else 0,
        signal=int(signal) if signal.isdigit() else 0,
    )


def parse_mem_mib(text: str | int) -> int:
    """Return MiB of an sbatch memory size (``4G``, ``512M``, ``2048``; the default unit is M, sbatch(1) --mem)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", str(text).strip(), re.IGNORECASE)
    if not match:
        raise ValueError(f"{text!r} is not a memory size")
    return int(float(match.group(1)) * _MIB_PER_UNIT[match.group(2).upper() or "M"])


def parse_time_s(text: str) -> int | None:
    """Return the seconds of an sbatch time limit, None for no limit; zero is no limit too.

    The forms of sbatch(1) --time: ``minutes``, ``minutes:seconds``, ``hours:minutes:seconds``,
    ``days-hours``, ``days-hours:minutes``, ``days-hours:minutes:seconds``.
    """
    text = text.strip()
    if text.upper() in {"UNLIMITED", "INFINITE"}:
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not match:
        raise ValueError(f"{text!r} is not a time limit")
    days, first, second, third = (None if part is None else int(part) for part in match.groups())
    if days is not None:
        seconds = ((days * 24 + (first or 0)) * 60 + (second or 0)) * 60 + (third or 0)
    elif third is not None:
        seconds = ((first or 0) * 60 + (second or 0)) * 60 + third
    else:
        seconds = (first or 0) * 60 + (second or 0)
    return seconds or None


def format_time(seconds: int) -> str:
    """Return a time limit as sbatch takes it: ``1-12:00:00``."""
    days, rest = divmod(seconds, 86400)
    text = f"{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days}-{text}" if days else text


def parse_gpus(text: str | int) -> tuple[int, str]:
    """Return count and type of a GPU request: ``2``, ``a100``, ``a100:2``, ``a100:1,v100:1``.

    Returns:
        The number of GPUs, and their type or "" when it is not given or differs.
    """
    count, types = 0, set()
    for part in str(text).split(","):
        name, _, number = part.strip().rpartition(":")
        if not number.isdigit():
            name, number = part.strip(), "1"
        if not re.fullmatch(r"[\w.+-]*", name):
            raise ValueError(f"{text!r} is not a GPU request")
        count += int(number)
        types.add(name)
    return count, types.pop() if len(types) == 1 else ""


def parse_gres(text: str) -> dict[str, tuple[int, str]]:
    """Return what a --gres value asks for: ``gpu:a100:4,shard:2`` is ``{"gpu": (4, "a100"), "shard": (2, "")}``."""
    result: dict[str, tuple[int, str]] = {}
    for part in text.split(","):
        match = re.fullmatch(
            r"(?:gres[:/])?([A-Za-z_]\w*)(?:[:/](?!\d+[KMGT]?$)([\w.+-]+))?(?:[:=](\d+)([KMGT]?))?",
            part.strip(),
        )
        if not match:
            raise ValueError(f"{part.strip()!r} is not name[:type]:count")
        name, kind, number, unit = match.groups()
        factor = 1024 ** ("KMGT".index(unit) + 1) if unit else 1
        total, previous = result.get(name, (0, kind or ""))
        result[name] = (total + int(number or 1) * factor, previous if previous == (kind or "") else "")
    return result
