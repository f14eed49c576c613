"""A workload in waves: each wave has to finish, whatever happens meanwhile.

    python driver.py PROGRESS CPUS SECONDS PAUSE

Writes a line of JSON into PROGRESS after each wave, and with each line what Ray says of its nodes. A file PROGRESS.stop
ends it after the present wave.
"""

import json
import os
import sys
import time

import ray


@ray.remote(num_cpus=2, max_retries=-1)
def work(seconds):
    time.sleep(seconds)
    return os.environ.get("SLURM_JOB_ID")


def main():
    progress, tasks, seconds, pause = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
    ray.init(log_to_driver=False)
    wave = 0
    while not os.path.exists(progress + ".stop"):
        wave += 1
        jobs = ray.get([work.remote(seconds) for _ in range(tasks)])
        with open(progress, "a") as file:
            file.write(json.dumps({"time": time.time(), "wave": wave, "jobs": sorted(set(jobs))}) + "\n")
        time.sleep(pause)


main()
