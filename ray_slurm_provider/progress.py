"""What a person sees while the head's job waits."""

import atexit
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.status import Status
from typing_extensions import Self

from ray_slurm_provider.errors import SlurmError
from ray_slurm_provider.nodes import Node
from ray_slurm_provider.slurm.reasons import in_words

_REPEAT_S = 300.0


class HeadProgress:
    """Shows a node's state: one live line in a terminal, elsewhere a line for each change."""

    def __init__(self, log: Path, console: Console | None = None) -> None:
        self._console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._log = log
        self._last = ""
        self._said_at = float("-inf")
        self._began = time.monotonic()
        self._status: Status | None = None

    def __enter__(self) -> Self:
        self._console.print(f"log: {self._log}", markup=False)
        self._console.print("Ctrl-C leaves the head where it is; `ray up` finds it again.", markup=False)
        if self._console.is_terminal:
            # Ctrl-C ends the process without coming back here, and the live line hides the cursor.
            atexit.register(self._console.show_cursor)
            self._status = self._console.status("")
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def tell(self, node: Node) -> None:
        self._show(describe(node))

    def trouble(self, error: SlurmError) -> None:
        self._show(f"SLURM does not answer, trying again: {error.complaint}")

    def _show(self, text: str) -> None:
        if self._status is not None:
            self._status.update(f"{text} ({time.monotonic() - self._began:.0f} s)")
        now = time.monotonic()
        if self._status is None and (text != self._last or now - self._said_at > _REPEAT_S):
            self._console.print(text, markup=False)
            self._last, self._said_at = text, now


def describe(node: Node) -> str:
    """Return one line on a node: job, state; and reason and expected start, or where it runs."""
    seen = node.seen
    parts = [node.label, seen.state]
    if seen.queued:
        parts += waits_for(node)
    else:
        parts += [f"on {seen.place}"] if seen.place else []
        parts += ["Ray is up" if node.ready else "Ray is starting"]
    return ", ".join(parts)


def waits_for(node: Node) -> list[str]:
    """Return what a queued node waits for: reason, expected start; nothing for one that runs."""
    seen = node.seen
    if not seen.queued:
        return []
    return [
        *([f"reason {in_words(seen.reason)}"] if seen.reason else []),
        *([f"start expected {seen.start}"] if seen.start else []),
    ]
