"""Certificates that other people's code believes: OpenSSL, through Python's ssl."""

from __future__ import annotations

import ssl
import sys
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from ray_slurm_provider import files, preflight, tls
from ray_slurm_provider.errors import StateError
from ray_slurm_provider.findings import FAILURE, OK


def _shake_hands(authority, pem, name):
    """Connect to a host with this certificate by a name or an address, both sides checking; None when all is well."""
    ours, theirs = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=authority / "ca.crt")
    server.verify_mode = ssl.CERT_REQUIRED
    client = ssl.create_default_context(cafile=authority / "ca.crt")
    for context in (server, client):
        context.load_cert_chain(pem)
        # What Python asks for since 3.13.
        context.verify_flags |= ssl.VERIFY_X509_STRICT
    ends = [
        client.wrap_bio(ours, theirs, server_hostname=name),
        server.wrap_bio(theirs, ours, server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError as error:
                return error.verify_message
    return None


def test_a_hosts_certificate_is_signed_by_the_clusters_authority_for_all_its_addresses(tmp_path):
    authority = tmp_path / "it's tls"
    tls.make_authority(authority, "demo")
    before = (authority / "ca.crt").read_text()
    tls.make_authority(authority, "demo")
    assert (authority / "ca.crt").read_text() == before
    own = authority / "host.pem"
    tls.make_certificate(authority, own, ["10.0.0.1", "fd00::1", "10.0.0.1"])
    for name in ("10.0.0.1", "fd00::1", "127.0.0.1", "::1", "localhost", tls.socket.gethostname()):
        assert _shake_hands(authority, own, name) is None
    for name in ("10.0.0.2", "elsewhere"):
        assert "mismatch" in _shake_hands(authority, own, name)
    for path in authority.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600
    assert authority.stat().st_mode & 0o777 == 0o700
    # Nothing of the making is left.
    assert {path.name for path in authority.iterdir()} == {"ca.crt", "ca.key", "host.pem"}
    assert list(tmp_path.iterdir()) == [authority]


def test_another_authority_does_not_count(tmp_path):
    for name in ("one", "other"):
        tls.make_authority(tmp_path / name, "demo")
    tls.make_certificate(tmp_path / "one", tmp_path / "host.pem", [])
    assert "certificate" in _shake_hands(tmp_path / "other", tmp_path / "host.pem", "localhost")


def test_the_longest_cluster_name_has_an_authority(tmp_path):
    tls.make_authority(tmp_path / "tls", "x" * 63)
    tls.make_certificate(tmp_path / "tls", tmp_path / "host.pem", [])
    assert _shake_hands(tmp_path / "tls", tmp_path / "host.pem", "localhost") is None


def test_a_host_whose_clock_lags_takes_a_new_certificate_for_a_valid_one(tmp_path):
    tls.make_authority(tmp_path / "tls", "demo")
    tls.make_certificate(tmp_path / "tls", tmp_path / "host.pem", [])
    for path in (tmp_path / "tls" / "ca.crt", tmp_path / "host.pem"):
        found = x509.load_pem_x509_certificate(path.read_bytes())
        now = datetime.now(timezone.utc)
        assert found.not_valid_before_utc <= now - timedelta(hours=23)
        assert found.not_valid_after_utc >= now + timedelta(days=3000)


@pytest.mark.parametrize("slow", ["ca.key", "ca.crt"])
def test_of_two_authorities_that_are_made_at_once_one_wins_and_its_key_fits_its_certificate(
    tmp_path, monkeypatch, slow
):
    directory, write = tmp_path / "tls", files.write_atomically

    def write_slowly(path, text):
        if path.name == slow:
            # Another is faster meanwhile, from the first line to the last.
            monkeypatch.setattr(tls, "write_atomically", write)
            tls.make_authority(directory, "faster")
        write(path, text)

    monkeypatch.setattr(tls, "write_atomically", write_slowly)
    tls.make_authority(directory, "slower")
    certificate = x509.load_pem_x509_certificate((directory / "ca.crt").read_bytes())
    key = load_pem_private_key((directory / "ca.key").read_bytes(), None)
    assert key.public_key() == certificate.public_key()
    assert "faster" in certificate.subject.rfc4514_string()
    assert list(tmp_path.iterdir()) == [directory]


def test_an_authority_that_is_missing_or_broken_and_a_directory_that_is_something_else_are_told(tmp_path):
    with pytest.raises(StateError, match=r"no certificate can be made .*nothing"):
        tls.make_certificate(tmp_path / "nothing", tmp_path / "host.pem", [])
    tls.make_authority(tmp_path / "tls", "demo")
    (tmp_path / "tls" / "ca.key").write_text("x")
    with pytest.raises(StateError, match="no certificate can be made"):
        tls.make_certificate(tmp_path / "tls", tmp_path / "host.pem", [])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(StateError, match="authority cannot be made"):
        tls.make_authority(tmp_path / "full", "demo")
    assert (tmp_path / "full" / "file").read_text() == "mine"


def test_a_host_without_the_package_says_so(tmp_path, monkeypatch):
    tls.make_authority(tmp_path / "there", "demo")
    monkeypatch.delitem(sys.modules, "ray_slurm_provider.tls_certificates")
    monkeypatch.delattr("ray_slurm_provider.tls_certificates")
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(StateError, match=r"the Python \S+ on \S+ lacks the package cryptography"):
        tls.make_authority(tmp_path / "tls", "demo")
    with pytest.raises(StateError, match="lacks the package cryptography"):
        tls.make_certificate(tmp_path / "there", tmp_path / "host.pem", [])


def test_the_check_before_ray_up_looks_for_the_package(monkeypatch):
    def look(*, on):
        site = SimpleNamespace(settings=SimpleNamespace(tls=on, command_runner="srun"))
        return [found.level for found in preflight._programs(site) if found.check == "cryptography"]

    assert look(on=False) == []
    assert look(on=True) == [OK]
    monkeypatch.setattr(preflight, "find_spec", lambda _: None)
    assert look(on=True) == [FAILURE]
