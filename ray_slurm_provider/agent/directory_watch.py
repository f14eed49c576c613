"""How the head's agent looks after the cluster's directory: its files stay young, and a deleted one is missed."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_TOUCH_S = 86400.0
# A network file system takes its time, and signals wait meanwhile.
_FILES_AT_ONCE = 200


class DirectoryWatch:
    """Looks after one directory, by a monotonic clock in seconds."""

    def __init__(self, root: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._root = root
        self._device = _device(root.parent)
        self._clock = clock
        self._touch_at = clock()
        self._untouched: Iterator[Path] = iter(())

    def keep_young(self) -> None:
        """Touch every file once a day, some of them at each call: scratch file systems are purged by age."""
        if self._clock() >= self._touch_at:
            self._touch_at = self._clock() + _TOUCH_S
            self._untouched = (Path(folder, name) for folder, _, names in os.walk(self._root) for name in names)
        with contextlib.suppress(RecursionError):  # directories a thousand deep
            for path in itertools.islice(self._untouched, _FILES_AT_ONCE):
                with contextlib.suppress(OSError):
                    if path.lstat().st_uid == os.getuid():
                        os.utime(path, follow_symlinks=False)

    def is_deleted(self) -> bool:
        """Tell whether it is positively gone: what held it is still there, on the same file system."""
        try:
            self._root.stat()
        except FileNotFoundError:
            return self._device is not None and _device(self._root.parent) == self._device
        except OSError:
            pass
        return False


def _device(path: Path) -> int | None:
    try:
        return path.stat().st_dev
    except OSError:
        return None
