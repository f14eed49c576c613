"""Birth certificates in files, for sites that own the comment of jobs.

The file is there before the job is, and the job's name ends with the token: whatever happens between the two, the job
is recognised by the first listing that shows it.
"""

import re
from pathlib import Path

from ray_slurm_provider.birth_certificate import BirthCertificate, read_certificate
from ray_slurm_provider.files import write_atomically

_TOKEN = re.compile(r"-([a-z0-9]{6})$")


class BirthRecords:
    """The records of one cluster."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._known: dict[str, BirthCertificate] = {}

    def save(self, certificate: BirthCertificate) -> None:
        self._directory.mkdir(mode=0o700, exist_ok=True)
        write_atomically(self._path(certificate.token), certificate.text())

    def forget(self, certificate: BirthCertificate) -> None:
        self._path(certificate.token).unlink(missing_ok=True)

    def of_job(self, job_name: str) -> BirthCertificate | None:
        """Return the certificate of the job with this name, None when it is none of ours."""
        token = token_in(job_name)
        if token and token not in self._known:
            try:
                certificate = read_certificate(self._path(token).read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError):
                return None
            if certificate is None or certificate.token != token:
                return None
            self._known[token] = certificate
        return self._known.get(token)

    def _path(self, token: str) -> Path:
        return self._directory / f"{token}.birth"


def token_in(job_name: str) -> str:
    """Return the launch token that a job's name ends with; "" when there is none."""
    match = _TOKEN.search(job_name)
    return match.group(1) if match is not None else ""
