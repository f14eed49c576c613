"""Certificates that openssl itself believes."""

from __future__ import annotations

import subprocess

import pytest

from ray_slurm_provider import tls
from ray_slurm_provider.errors import StateError


def _openssl(*words):
    return subprocess.run(["openssl", *map(str, words)], capture_output=True, text=True)


def test_a_hosts_certificate_is_signed_by_the_clusters_authority_for_all_its_addresses(tmp_path):
    authority = tmp_path / "it's tls"
    tls.make_authority(authority, "demo")
    before = (authority / "ca.crt").read_text()
    tls.make_authority(authority, "demo")
    assert (authority / "ca.crt").read_text() == before
    own = authority / "host.pem"
    tls.make_certificate(authority, own, ["10.0.0.1", "fd00::1"])
    for address in ("10.0.0.1", "fd00::1", "127.0.0.1"):
        done = _openssl("verify", "-CAfile", authority / "ca.crt", "-verify_ip", address, own)
        assert done.returncode == 0, done.stderr
    assert _openssl("verify", "-CAfile", authority / "ca.crt", "-verify_ip", "10.0.0.2", own).returncode
    public = _openssl("x509", "-in", own, "-pubkey", "-noout").stdout
    assert public == _openssl("pkey", "-in", own, "-pubout").stdout
    for path in authority.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600
    assert authority.stat().st_mode & 0o777 == 0o700
    # Nothing of the making is left.
    assert {path.name for path in authority.iterdir()} == {"ca.crt", "ca.key", "host.pem"}


def test_another_authority_does_not_count(tmp_path):
    for name in ("one", "other"):
        tls.make_authority(tmp_path / name, "demo")
    tls.make_certificate(tmp_path / "one", tmp_path / "host.pem", [])
    assert _openssl("verify", "-CAfile", tmp_path / "other" / "ca.crt", tmp_path / "host.pem").returncode


def test_what_openssl_says_is_passed_on_and_its_absence_told(tmp_path, monkeypatch):
    with pytest.raises(StateError, match="openssl x509 failed"):
        tls.make_certificate(tmp_path / "nothing", tmp_path / "host.pem", [])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StateError, match="openssl is not on PATH"):
        tls.make_authority(tmp_path / "tls", "demo")
