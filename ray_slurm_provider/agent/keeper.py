"""Puts the cluster's directory back when somebody has deleted it, or parts of it, while the cluster lives.

The head's agent remembers the few files that cannot be made again by others; what the nodes say of themselves, each
writes again.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ray_slurm_provider.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

logger = logging.getLogger(__name__)

_FILES = ("ray_bootstrap_config.yaml", "auth_token", "submit_env.json")
# Their files are written once and never changed; one that is missing there was removed on purpose.
_DIRECTORIES = ("tls", "births")
_EMPTY = ("nodes", "logs")


class DirectoryKeeper:
    """The memory of one cluster's directory.

    Args:
        root: The directory.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[Path, tuple[int, str]] = {}
        self._directory_times: dict[str, int] = {}

    def tend(self) -> bool:
        """Remember what has changed and put back what is missing; tell whether something was."""
        found = False
        try:
            for path in self._present():
                self._remember(path)
            missing = [path for path in self._known if not path.exists()]
            found = bool(missing) or not all((self._root / name).is_dir() for name in _EMPTY)
            if found:
                self._put_back(missing)
        except OSError as error:
            logger.warning("the cluster's directory cannot be kept: %s", error)
        return found

    def _present(self) -> Iterator[Path]:
        yield from (path for name in _FILES if (path := self._root / name).is_file())
        for name in _DIRECTORIES:
            directory = self._root / name
            changed = directory.stat().st_mtime_ns if directory.is_dir() else 0
            if changed and changed != self._directory_times.get(name):
                self._directory_times[name] = changed
                self._strike_out(directory)
                yield from (path for path in directory.iterdir() if path.is_file())

    def _strike_out(self, directory: Path) -> None:
        known = [path for path in self._known if path.parent == directory]
        missing = [path for path in known if not path.exists()]
        # Where none is left, the directory itself was deleted and made again.
        if len(missing) < len(known):
            for path in missing:
                del self._known[path]

    def _remember(self, path: Path) -> None:
        changed = path.stat().st_mtime_ns
        if self._known.get(path, (0, ""))[0] != changed:
            self._known[path] = (changed, path.read_text(encoding="utf-8"))

    def _put_back(self, missing: list[Path]) -> None:
        logger.warning("parts of the cluster's directory %s were deleted; putting them back", self._root)
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for directory in {*(self._root / name for name in _EMPTY), *(path.parent for path in missing)}:
            directory.mkdir(mode=0o700, exist_ok=True)
        for path in missing:
            _, text = self._known[path]
            write_atomically(path, text)
            self._known[path] = (path.stat().st_mtime_ns, text)
