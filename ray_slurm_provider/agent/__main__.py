"""``python -m ray_slurm_provider.agent``: what the batch script becomes."""

import logging
import os
import sys

from ray_slurm_provider.agent.guard import run_guarded
from ray_slurm_provider.agent.spec import take_spec
from ray_slurm_provider.agent.supervisor import Supervisor

_EPILOGUE_VARIABLE = "RAY_SLURM_EPILOGUE"


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout)
    spec = take_spec(os.environ)
    supervisor = Supervisor(spec, dict(os.environ))
    code = run_guarded(supervisor.run, supervisor.clean_up_after_kill)
    if spec.epilogue:
        sys.stdout.write("running the epilogue\n")
        sys.stdout.flush()
        # The guard has done its work: this process becomes the epilogue, with the exit code of the node.
        # Its lines go by the environment: everybody on the host may read arguments.
        os.environ[_EPILOGUE_VARIABLE] = "\n".join([f"unset {_EPILOGUE_VARIABLE}", *spec.epilogue, f"exit {code}"])
        os.execvp("bash", ["bash", "-c", f'eval "${_EPILOGUE_VARIABLE}"'])  # noqa: S606 the site's own lines
    return code


if __name__ == "__main__":
    sys.exit(main())
