"""``python -m benchmarks``: measure everything in one run."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from benchmarks import jobs, node, plot, reconciler, with_ray
from benchmarks.results import Result, as_json, table

if TYPE_CHECKING:
    from collections.abc import Callable

_PARTS = ("listing", "creating", "agent", "reconciler", "latencies", "many", "queued")


def main() -> None:
    """Run the parts that were asked for, and write what came out of them."""
    options = _options()
    os.environ.pop("SLURM_CONF", None)
    # One and the same answer on every machine: Ray would ask the network whether somebody wants statistics.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    console = Console(width=max(Console().width, 170))
    results: list[Result] = []
    phases: dict[str, float] = {}
    for part in options.only or _PARTS:
        console.print(f"... {part}")
        found = _run(part, options)
        if part == "latencies":
            phases = with_ray.phases_of(found)
        results += found
    console.print(table(results))
    if options.json:
        about = {"machine": platform.platform(), "cpus": os.cpu_count(), "python": sys.version.split()[0]}
        text = json.dumps({**about, "results": as_json(results), "phases": phases}, indent=1)
        options.json.write_text(text + "\n")
    if options.svg:
        options.svg.mkdir(parents=True, exist_ok=True)
        (options.svg / "ratios.svg").write_text(plot.ratios(results))
        if phases:
            (options.svg / "phases.svg").write_text(plot.phases(phases))


def _run(part: str, options: argparse.Namespace) -> list[Result]:
    sizes, quick = options.sizes, options.quick
    parts: dict[str, Callable[[], list[Result]]] = {
        "listing": lambda: jobs.listing(sizes or ([20] if quick else [100, 1000, 10000])),
        "creating": lambda: jobs.creating(sizes or ([1, 20] if quick else [1, 100, 1000])),
        "agent": lambda: node.agent(rounds=1 if quick else 5, rest_s=2 if quick else 100),
        "reconciler": lambda: reconciler.reconciler(sizes or ([50] if quick else [1000, 5000])),
        "latencies": lambda: with_ray.latencies(rounds=1 if quick else options.rounds),
        "many": lambda: with_ray.many(workers=2 if quick else 8, rest_s=5 if quick else 120),
        "queued": lambda: with_ray.queued(seconds=5 if quick else 60),
    }
    return parts[part]()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small numbers: only to see that everything works")
    parser.add_argument("--only", nargs="+", choices=_PARTS, metavar="PART", help=f"of {', '.join(_PARTS)}")
    parser.add_argument("--sizes", nargs="+", type=int, metavar="N", help="numbers of jobs or workers")
    parser.add_argument("--rounds", type=int, default=5, help="how often a latency is measured")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--svg", type=Path, metavar="DIRECTORY", help="draw ratios.svg and phases.svg there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
