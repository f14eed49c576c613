"""Doing something only once in a while, in a loop that turns more often."""

import time


class Pace:
    """Says at most once in a while that it is time."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._next = 0.0

    def due(self) -> bool:
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self._every_s
        return True
