"""Certificates for Ray's TLS: one authority per cluster, and one certificate per host for all its addresses.

Made by the ``openssl`` command, which every Linux has. Ray checks both ends of each connection
(ray/_common/tls_utils.py; docs.ray.io, "TLS authentication"), so whoever connects needs one too.
Imports the standard library only.
"""

from __future__ import annotations

import socket
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ray_slurm_provider.errors import StateError
from ray_slurm_provider.files import random_name, remove_tree, write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

_DAYS = "3650"
_CONFIG = """\
[req]
distinguished_name = name
x509_extensions = authority
[name]
[authority]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
[host]
basicConstraints = CA:FALSE
subjectAltName = {names}
"""
_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def make_authority(directory: Path, cluster: str) -> None:
    """Make the cluster's authority, unless it is there.

    Args:
        directory: Where; made with 0700.
        cluster: The cluster's name.

    Raises:
        StateError: openssl is missing or failed.
    """
    if (directory / "ca.crt").exists():
        return
    directory.mkdir(mode=0o700, exist_ok=True)
    with _workspace(directory, []) as work:
        subject = ("-subj", f"/CN=ray-slurm cluster {cluster}")
        _openssl(
            work,
            "req",
            "-config",
            "config",
            "-x509",
            *_NEW_KEY,
            "-keyout",
            "key",
            "-out",
            "crt",
            "-days",
            _DAYS,
            *subject,
        )
        write_atomically(directory / "ca.key", (work / "key").read_text())
        write_atomically(directory / "ca.crt", (work / "crt").read_text())


def make_certificate(authority: Path, target: Path, addresses: Iterable[str]) -> None:
    """Make a certificate and a key for this host, in one file: replacing both at once cannot mix two pairs.

    Args:
        authority: Directory of the cluster's authority.
        target: The file.
        addresses: The host's addresses.

    Raises:
        StateError: The authority or openssl is missing, or openssl failed.
    """
    with _workspace(target.parent, addresses) as work:
        _openssl(
            work,
            "req",
            "-config",
            "config",
            "-new",
            *_NEW_KEY,
            "-keyout",
            "key",
            "-out",
            "csr",
            "-subj",
            "/CN=ray node",
        )
        signer = ["-CA", str(authority / "ca.crt"), "-CAkey", str(authority / "ca.key")]
        signer += ["-CAcreateserial", "-CAserial", "serial"]
        extensions = ["-extfile", "config", "-extensions", "host"]
        _openssl(work, "x509", "-req", "-in", "csr", "-out", "crt", "-days", _DAYS, *signer, *extensions)
        write_atomically(target, (work / "crt").read_text() + (work / "key").read_text())


def tls_environment(authority: Path, target: Path) -> dict[str, str]:
    """Return the variables that make a process of Ray use a certificate."""
    return {
        "RAY_USE_TLS": "1",
        "RAY_TLS_CA_CERT": str(authority / "ca.crt"),
        "RAY_TLS_SERVER_CERT": str(target),
        "RAY_TLS_SERVER_KEY": str(target),
    }


@contextmanager
def _workspace(parent: Path, addresses: Iterable[str]) -> Iterator[Path]:
    """Give a directory for openssl's files, with its configuration in it, and remove it in the end."""
    names = [f"DNS:{name}" for name in ("localhost", socket.gethostname())]
    names += [f"IP:{address}" for address in dict.fromkeys(["127.0.0.1", "::1", *addresses])]
    directory = parent / f".openssl-{random_name(8)}"
    directory.mkdir(mode=0o700)
    try:
        (directory / "config").write_text(_CONFIG.format(names=", ".join(names)))
        yield directory
    finally:
        remove_tree(directory)


def _openssl(work: Path, *arguments: str) -> None:
    try:
        done = subprocess.run(["openssl", *arguments], cwd=work, capture_output=True, text=True, check=False)
    except OSError as error:
        raise StateError(f"openssl is not on PATH of {socket.gethostname()}; `tls: true` needs it") from error
    if done.returncode:
        raise StateError(f"openssl {arguments[0]} failed: {done.stderr.strip()}")
