"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARNING, FAILURE = "ok", "warning", "failure"
# Ray wants more, and says so (docs.ray.io, "Ray cluster: ulimit").
FEW_FILES = 4096


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: What was looked at.
        level: `OK`, `WARNING` or `FAILURE`.
        text: What was found.
        advice: What to do about it; "" when all is well.
    """

    check: str
    level: str
    text: str
    advice: str = ""
