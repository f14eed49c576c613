"""Birth certificates in files, for sites that own the comment of jobs.

The file is there before the job is, and the job's name ends with the token: whatever happens between the two, the job
is recognised by the first listing that shows it.
"""

import errno
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from ray_slurm_provider.birth_certificate import BirthCertificate, read_certificate
from ray_slurm_provider.errors import StateError
from ray_slurm_provider.files import read_text, write_atomically

# What stands there is no record, and will never be one.
_NO_FILE = frozenset({errno.EISDIR, errno.EINVAL, errno.ELOOP, errno.EFBIG})
_TOKEN = re.compile(r"-([a-z0-9]{6})$")


# For so long a network file system may hide a new record from other hosts; after that, whether a job has got one after
# all is looked at seldom: it is somebody else's.
_HIDDEN_S = 60.0
_AGAIN_S = 600.0
# When squeue has not shown a job for so long, nobody needs its record; the controller is asked about a few at once.
_KEPT_S = 3600.0
_PRUNED_AT_ONCE = 10


class BirthRecords:
    """The records of one cluster, by a monotonic clock in seconds."""

    def __init__(self, directory: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._directory = directory
        self._clock = clock
        self._known: dict[str, BirthCertificate] = {}
        self._shown: dict[str, tuple[str, float]] = {}  # numbers of jobs, and when squeue showed them last
        self._missed: dict[str, float] = {}  # since when there is no record

    def save(self, certificate: BirthCertificate) -> None:
        self._directory.mkdir(mode=0o700, exist_ok=True)
        write_atomically(self._path(certificate.token), certificate.text())

    def forget(self, token: str) -> None:
        self._path(token).unlink(missing_ok=True)
        self._known.pop(token, None)
        self._shown.pop(token, None)

    def of_job(self, job_name: str) -> BirthCertificate | None:
        """Return the certificate of the job with this name, None when it is none of ours.

        Raises:
            StateError: It cannot be read now, and so nobody knows whose job it is.
        """
        token = token_in(job_name)
        if token and token not in self._known and self._may_be_there(token):
            certificate = self._read(token)
            if certificate is None or certificate.token != token:
                return None
            self._known[token] = certificate
        return self._known.get(token)

    def unneeded(self, jobs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """Return launch tokens and job numbers of which squeue has shown nothing for long.

        Args:
            jobs: Names and numbers of the jobs that it shows now.
        """
        if not self._known:
            return []
        now = self._clock()
        shown = {token_in(name): (number, now) for name, number in jobs}
        ours = {token: entry for token, entry in shown.items() if token in self._known}
        self._shown |= ours
        self._missed = {token: since for token, since in self._missed.items() if token in shown}
        # An answer without any job of ours may be that of another cluster.
        old = [(token, number) for token, (number, at) in self._shown.items() if ours and now - at >= _KEPT_S]
        for token, number in old[:_PRUNED_AT_ONCE]:
            self._shown[token] = (number, now)
        return old[:_PRUNED_AT_ONCE]

    def _may_be_there(self, token: str) -> bool:
        now = self._clock()
        missed_s = now - self._missed.get(token, now)
        if missed_s >= _AGAIN_S:
            self._missed[token] = now - _HIDDEN_S
        return not _HIDDEN_S <= missed_s < _AGAIN_S

    def _read(self, token: str) -> BirthCertificate | None:
        try:
            return read_certificate(read_text(self._path(token)))
        except FileNotFoundError:
            self._missed.setdefault(token, self._clock())
        except UnicodeDecodeError:
            pass
        except OSError as error:
            if error.errno in _NO_FILE:
                return None
            raise StateError(f"{self._path(token)} cannot be read: {error.strerror or error}") from error
        return None

    def _path(self, token: str) -> Path:
        return self._directory / f"{token}.birth"


def token_in(job_name: str) -> str:
    """Return the launch token that a job's name ends with; "" when there is none."""
    match = _TOKEN.search(job_name)
    return match.group(1) if match is not None else ""
