"""Estimates pi on as many CPUs as the cluster gets, and tells which SLURM jobs did the work.

ray exec CLUSTER.yaml "python examples/estimate_pi.py"
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import time

import ray


@ray.remote(num_cpus=1)
def count_hits(seed: int, samples: int) -> tuple[int, str]:
    """Return how many random points fell into the quarter circle, and the SLURM job that counted them."""
    generator = random.Random(seed)
    hits = sum(generator.random() ** 2 + generator.random() ** 2 < 1 for _ in range(samples))
    return hits, os.environ.get("SLURM_JOB_ID", "no job")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=12, help="how many tasks of one CPU")
    parser.add_argument("--samples", type=int, default=10_000_000, help="random points of each task")
    arguments = parser.parse_args()

    ray.init(log_to_driver=False)
    began = time.monotonic()
    results = ray.get([count_hits.remote(seed, arguments.samples) for seed in range(arguments.tasks)])
    hits = sum(hits for hits, _ in results)
    print(f"pi is about {4 * hits / (arguments.tasks * arguments.samples):.5f}")
    print(f"{arguments.tasks} tasks took {time.monotonic() - began:.0f} s")
    for job, count in sorted(collections.Counter(job for _, job in results).items()):
        print(f"SLURM job {job} ran {count} of them")


if __name__ == "__main__":
    main()
