"""What a check found. Imports the standard library only: probe jobs report it, too."""

from dataclasses import dataclass
from typing import Final, Literal

OK: Final = "ok"
WARNING: Final = "warning"
FAILURE: Final = "failure"


@dataclass(frozen=True)
class Finding:
    """One line of `ray-slurm check`."""

    check: str  # what was looked at
    level: Literal["ok", "warning", "failure"]
    text: str
    advice: str = ""  # what to do about it; "" when all is well
