"""``python -m ray_slurm_provider.agent SPEC``: what the batch script becomes."""

from __future__ import annotations

import logging
import os
import sys

from ray_slurm_provider.agent.guard import run_guarded
from ray_slurm_provider.agent.spec import read_spec
from ray_slurm_provider.agent.supervisor import Supervisor


def main() -> int:
    """Run the node that the first argument describes; return the job's exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout)
    supervisor = Supervisor(read_spec(sys.argv[1]), dict(os.environ))
    return run_guarded(supervisor.run, supervisor.clean_up_after_kill)


if __name__ == "__main__":
    sys.exit(main())
