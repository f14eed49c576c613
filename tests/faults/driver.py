"""A workload in waves: each wave has to finish, whatever happens meanwhile.

    python driver.py PROGRESS CPUS SECONDS

A number in the file PROGRESS.todo says how many waves there shall be, a negative one ends it. A line of JSON is added to
PROGRESS after each.
"""

import json
import os
import sys
import time

import ray


@ray.remote(num_cpus=2, max_retries=-1)
def work(seconds):
    time.sleep(seconds)
    return os.environ["RAY_CLOUD_INSTANCE_ID"].rpartition("-")[0]


def wanted(path):
    try:
        with open(path) as file:
            return int(file.read())
    except (OSError, ValueError):
        return 0


def main():
    progress, tasks, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    ray.init(log_to_driver=False)
    wave = 0
    while (todo := wanted(progress + ".todo")) >= 0:
        if wave >= todo:
            time.sleep(0.1)
            continue
        wave += 1
        jobs = ray.get([work.remote(seconds) for _ in range(tasks)])
        with open(progress, "a") as file:
            file.write(json.dumps({"time": time.time(), "wave": wave, "jobs": sorted(set(jobs))}) + "\n")


main()
