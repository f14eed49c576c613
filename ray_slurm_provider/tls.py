"""Certificates for Ray's TLS: one authority per cluster, and one certificate per host for all its names and addresses.

Ray checks both ends of each connection (ray/_common/tls_utils.py; docs.ray.io, "TLS authentication"), so whoever
connects needs one too. `cryptography` is loaded when it is used: nodes without TLS do not pay for it.
"""

import shutil
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from ray_slurm_provider.errors import StateError
from ray_slurm_provider.files import random_name, read_text, write_atomically


def make_authority(directory: Path, cluster: str) -> None:
    """Make the cluster's authority in a directory of its own, unless it is there.

    Key and certificate appear together, by renaming the directory; of two at once the first wins.

    Raises:
        StateError: `cryptography` is missing, or something else is in the directory.
    """
    if (directory / "ca.crt").exists():
        return
    certificate, key = _certificates().new_authority(f"ray-slurm cluster {cluster}")
    work = directory.with_name(f".{directory.name}.{random_name(8)}")
    work.mkdir(mode=0o700)
    try:
        write_atomically(work / "ca.key", key)
        write_atomically(work / "ca.crt", certificate)
        work.rename(directory)
    except OSError as error:
        if not (directory / "ca.crt").exists():
            raise StateError(f"the cluster's authority cannot be made in {directory}: {error.strerror}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def make_certificate(authority: Path, target: Path, addresses: Iterable[str]) -> None:
    """Make a certificate and a key for this host, in one file: replacing both at once cannot mix two pairs.

    Raises:
        StateError: `cryptography` or the authority is missing or broken.
    """
    names = dict.fromkeys(["localhost", socket.gethostname()])
    try:
        texts = [read_text(authority / name) for name in ("ca.crt", "ca.key")]
        text = _certificates().new_certificate(*texts, names, dict.fromkeys(["127.0.0.1", "::1", *addresses]))
    except (OSError, ValueError) as error:
        raise StateError(f"no certificate can be made with the authority in {authority}: {error}") from error
    write_atomically(target, text)


def tls_environment(authority: Path, target: Path) -> dict[str, str]:
    """Return the variables that make a process of Ray use a certificate."""
    return {
        "RAY_USE_TLS": "1",
        "RAY_TLS_CA_CERT": str(authority / "ca.crt"),
        "RAY_TLS_SERVER_CERT": str(target),
        "RAY_TLS_SERVER_KEY": str(target),
    }


def _certificates() -> ModuleType:
    try:
        from ray_slurm_provider import tls_certificates  # noqa: PLC0415 only with tls: true
    except ImportError as error:
        raise StateError(
            f"the Python {sys.executable} on {socket.gethostname()} lacks the package cryptography, which tls: true"
            f" needs: {error}"
        ) from error
    return tls_certificates
