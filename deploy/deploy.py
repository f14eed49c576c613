#!/usr/bin/env python3
"""Ask this site's SLURM what it has and write a cluster YAML: `ray-slurm deploy`, from a clone.

python3 deploy/deploy.py --help
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

CLONE = Path(__file__).resolve().parents[1]
PYTHON = CLONE / ".venv" / "bin" / "python"


def main() -> None:
    """Run `ray-slurm deploy` with the code of this clone."""
    sys.path.insert(0, str(CLONE))
    try:
        from ray_slurm_provider.cli import main as ray_slurm  # noqa: PLC0415 only now it can be found
    except ImportError as error:
        if PYTHON.exists() and Path(sys.prefix) != PYTHON.parents[1]:
            os.execv(PYTHON, [str(PYTHON), *sys.argv])  # noqa: S606 what quickstart.sh and tests/run.sh have made
        sys.exit(
            f"deploy.py: the Python {sys.executable} lacks {error.name}\n"
            f"  install what is needed first, in an environment of your own:  pip install {CLONE}"
        )
    sys.argv[:1] = ["ray-slurm", "deploy"]
    ray_slurm()


if __name__ == "__main__":
    main()
