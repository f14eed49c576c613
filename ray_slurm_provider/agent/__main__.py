"""``python -m ray_slurm_provider.agent SPEC``: what the batch script becomes."""

import logging
import os
import sys

from ray_slurm_provider.agent.guard import run_guarded
from ray_slurm_provider.agent.spec import read_spec
from ray_slurm_provider.agent.supervisor import Supervisor


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout)
    spec = read_spec(sys.argv[1])
    supervisor = Supervisor(spec, dict(os.environ))
    code = run_guarded(supervisor.run, supervisor.clean_up_after_kill)
    if spec.epilogue:
        sys.stdout.write("running the epilogue\n")
        sys.stdout.flush()
        # The guard has done its work: this process becomes the epilogue, with the exit code of the node.
        os.execvp("bash", ["bash", "-c", "\n".join([*spec.epilogue, f"exit {code}"])])  # noqa: S606 the site's own lines
    return code


if __name__ == "__main__":
    sys.exit(main())
