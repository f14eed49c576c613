#!/usr/bin/env python3
"""sbatch, squeue, scancel and scontrol in miniature, by the name it is called with; standard library only.

The state is a directory, FAKE_SLURM_DIR: ``jobs.json``, and ``faults.json`` with the switches

    down        list of tools that cannot reach the controller
    hang        list of tools that give no answer
    refuse      what sbatch says when it refuses
    refuse_with what it says to a script with a directive, by directive
    lost        sbatch submits, but gives no answer
    sbatch_ends how sbatch ends before it submits anything, or after that, with "submits": "exit" or "signal", "out", "err"
    late        squeue does not show what is submitted
    comment     what the site writes into the comment of every job
    scontrol    what scontrol prints in place of the truth, on its standard error when it fails, and its exit code
    federation  what scontrol shows of the federation
    slurm       SLURM's name of the cluster
    controllers the hosts of its controller
    squeue      what squeue prints in place of the truth; "half" cuts the last line
    calls       counted by tool (written, not read)
"""

import json
import os
import re
import sys
import time
from pathlib import Path

HERE = Path(os.environ.get("FAKE_SLURM_DIR", ""))
SEPARATOR = "\x1f"
# What squeue itself prints above the rows, in the format that the provider asks for.
HEADER = SEPARATOR.join(
    ("JOBID", "STATE", "REASON", "PARTITION", "NODELIST", "TIME_LIMIT", "END_TIME", "START_TIME", "NAME", "COMMENT")
)


def load(name, default):
    path = HERE / name
    return json.loads(path.read_text()) if path.exists() else default


def save(name, value):
    temporary = HERE / f".{name}.{os.getpid()}"
    temporary.write_text(json.dumps(value))
    temporary.replace(HERE / name)


def directives(script):
    found = {}
    for line in script.splitlines():
        match = re.match(r"#SBATCH --([a-z-]+)(?:=(.*))?$", line)
        if match:
            value = match.group(2) or ""
            if value[:1] in ("'", '"'):
                value = re.sub(r"\\(.)", r"\1", value[1:-1])
            found[match.group(1)] = value
    return found


def sbatch(faults):
    if faults.get("refuse"):
        *first, last = faults["refuse"].split("\n")
        words = [*first, f"Batch job submission failed: {last}"]
        sys.exit("\n".join(f"sbatch: error: {line}" for line in words))
    script = sys.stdin.read()
    if "sbatch_ends" in faults and not faults["sbatch_ends"].get("submits"):
        end(faults["sbatch_ends"])
    jobs = load("jobs.json", [])
    options = directives(script)
    for name, words in faults.get("refuse_with", {}).items():
        if name in options:
            sys.exit(f"sbatch: error: Batch job submission failed: {words}")
    number = str(max([int(job["id"].partition("_")[0]) for job in jobs], default=0) + 1)
    last = int(options["array"].removeprefix("0-")) if "array" in options else 0
    if last >= faults.get("max_array_size", 1001):
        sys.exit("sbatch: error: Batch job submission failed: Invalid job array specification")
    if len([job for job in jobs if job["state"] == "PENDING"]) + last >= faults.get("max_submit", 10**9):
        sys.exit("sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: Job violates")
    jobs += (
        {
            "id": f"{number}_{index}" if "array" in options else number,
            "state": "PENDING",
            "name": options["job-name"],
            "comment": faults.get("comment", options.get("comment", "(null)")),
            "options": options,
            "cluster": os.environ.get("SLURM_CLUSTERS", ""),
            "forgotten": bool(faults.get("late")),
        }
        for index in range(last + 1)
    )
    save("jobs.json", jobs)
    (HERE / f"script-{number}.sh").write_text(script)
    if "sbatch_ends" in faults:
        end(faults["sbatch_ends"])
    if faults.get("lost"):
        sys.exit("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation")
    print("*** Welcome ***")
    print(f"{number};{os.environ['SLURM_CLUSTERS']}" if "SLURM_CLUSTERS" in os.environ else number)


def end(how):
    sys.stdout.write(how.get("out", ""))
    sys.stderr.write(how.get("err", ""))
    sys.stdout.flush()
    sys.stderr.flush()
    if "signal" in how:
        os.kill(os.getpid(), how["signal"])
    sys.exit(how.get("exit", 1))


def squeue(faults):
    if faults.get("squeue") not in (None, "half"):
        sys.stdout.write(faults["squeue"])
        return
    rows = [
        [
            row_id,
            job["state"],
            job.get("reason", "None"),
            "cpu",
            job.get("nodes", ""),
            "1:00:00",
            "N/A",
            "N/A",
            job["name"],
            job["comment"],
        ]
        for row_id, job in rows_of([job for job in load("jobs.json", []) if not job.get("forgotten")])
    ]
    text = "".join(line + "\n" for line in [HEADER, *map(SEPARATOR.join, rows)])
    if "SLURM_CLUSTERS" in os.environ:
        text = f"CLUSTER: {os.environ['SLURM_CLUSTERS']}\n{text}"
    sys.stdout.write(text[:-40] if faults.get("squeue") == "half" else text)


def rows_of(jobs):
    """Yield ids and jobs as squeue lists them: the elements of an array that wait are one row."""
    waiting = {}
    for job in jobs:
        number, _, index = job["id"].partition("_")
        if index and job["state"] == "PENDING":
            waiting.setdefault(number, (job, []))[1].append(index)
        else:
            yield job["id"], job
    for number, (job, indices) in waiting.items():
        yield f"{number}_[{','.join(indices)}]", job


def named(words):
    """Yield the ids that words of scancel stand for."""
    for word in words:
        number, bracket, indices = word.partition("_[")
        yield from (f"{number}_{index}" for index in indices.rstrip("]").split(",")) if bracket else [word]


def scancel(faults):
    jobs = load("jobs.json", [])
    doomed = set(named(sys.argv[1:]))
    for job in jobs:
        if doomed & {job["id"], job["id"].partition("_")[0]} and job["state"] in ("PENDING", "RUNNING", "REVOKED"):
            job["state"] = "CANCELLED"
    save("jobs.json", jobs)


def scontrol(faults):
    if sys.argv[1:2] == ["ping"]:
        print("Slurmctld(primary) at fake is UP")
        return
    if sys.argv[1:3] == ["show", "federation"]:
        print(faults.get("federation", ""), end="")
        return
    if sys.argv[1:3] == ["show", "config"]:
        print("Configuration data as of 2026-01-01T00:00:00")
        print(f"ClusterName             = {faults.get('slurm', 'fake')}")
        print(f"MaxArraySize            = {faults.get('says_max_array_size', 1001)}")
        for index, host in enumerate(faults.get("controllers", ["ctl1"])):
            print(f"SlurmctldHost[{index}]        = {host}(10.0.0.{index})")
        print("SlurmctldPort           = 6817")
        return
    if "scontrol" in faults:
        words, code = faults["scontrol"]
        (sys.stderr if code else sys.stdout).write(words)
        sys.exit(code)
    found = False
    for job in load("jobs.json", []):
        number, _, index = job["id"].partition("_")
        if sys.argv[-1] in {job["id"], number} and not job.get("purged"):
            element = f"ArrayJobId={number} ArrayTaskId={index} " if index else ""
            print(
                f"JobId={number} {element}JobName={job['name']} JobState={job['state']} Reason=None ExitCode=1:0 Comment={job['comment']}"
            )
            found = True
    if not found:
        sys.exit("slurm_load_jobs error: Invalid job id specified")


def main():
    tool = Path(sys.argv[0]).name
    faults = load("faults.json", {})
    calls = load("calls.json", {})
    calls[tool] = calls.get(tool, 0) + 1
    save("calls.json", calls)
    if tool in faults.get("hang", []):
        time.sleep(60)
    if tool in faults.get("down", []):
        sys.exit(f"{tool}: error: Unable to contact slurm controller (connect failure)")
    {"sbatch": sbatch, "squeue": squeue, "scancel": scancel, "scontrol": scontrol}[tool](faults)


if __name__ == "__main__":
    main()
