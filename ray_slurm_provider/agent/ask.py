"""``python -m ray_slurm_provider.agent.ask SOCKET run|end|restart [COMMAND]``: a command's word to the agent."""

from __future__ import annotations

import sys

from ray_slurm_provider.agent.requests import ask


def main() -> int:
    """Ask, and return the exit code of what the agent did."""
    try:
        return ask(*sys.argv[1:4])
    except OSError as error:
        sys.stderr.write(f"the node agent does not answer at {sys.argv[1]}: {error.strerror or error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
