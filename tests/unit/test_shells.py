"""How a command gets through the login shell of a host."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess

import pytest

from ray_slurm_provider.shells import LocalShell, SshShell, run

TEXTS = [
    "echo hello",
    "echo one\necho two",
    "echo 'it'\"'\"'s' \"$HOME\" `echo x` $((1 + 1)) hello! !! !$ \\\\ {a,b} é ~",
    "cat; exit 3",
    "cat <<'END'\n$x\n!y\nEND",
    "true # a comment",
    f": {'x ' * 30000}\necho long",
]


@pytest.fixture
def ssh(tmp_path, monkeypatch):
    """Put an ssh on PATH that has a login shell run its last word, as sshd does."""

    def make(login_shell):
        if not shutil.which(login_shell):
            pytest.skip(f"{login_shell} is not here")
        tool = tmp_path / "bin" / "ssh"
        tool.parent.mkdir()
        tool.write_text(f'#!/bin/bash\nexec {login_shell} -c "${{@: -1}}"\n')
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
        monkeypatch.setenv("HOME", str(tmp_path))
        exports = tmp_path / "ex ports!"
        exports.write_text("export FROM_EXPORTS=yes\n")
        return SshShell(exports, ["-p", "22", "host"], str(tmp_path))

    return make


@pytest.mark.parametrize("login_shell", ["bash", "dash", "tcsh", "zsh", "fish"])
def test_every_login_shell_passes_a_command_on_as_it_is(ssh, login_shell):
    shell = ssh(login_shell)
    for text in TEXTS:
        wanted = subprocess.run(["bash", "-c", text], input="in put", capture_output=True, text=True)
        check = '\n[ "$FROM_EXPORTS" = yes ]' if text.startswith("echo") else ""
        done = subprocess.run(
            shell.command(text + check, terminal=False), input="in put", capture_output=True, text=True
        )
        assert (done.stdout, done.returncode) == (wanted.stdout, wanted.returncode), (text[:80], done.stderr)


@pytest.mark.parametrize("login_shell", ["bash", "dash", "tcsh", "zsh", "fish"])
def test_every_login_shell_ends_what_was_interrupted(ssh, login_shell):
    shell = ssh(login_shell)
    argv = shell.command("echo ready; read word", terminal=False)
    child = subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    with child:
        assert child.stdout.readline() == b"ready\n"
        shell.interrupted()
        assert child.wait(20) == -signal.SIGTERM


def test_no_word_for_a_login_shell_holds_what_csh_reads_in_quotes(tmp_path):
    remote = SshShell(tmp_path / "e", ["host"], "/tmp").command("echo hello!\necho two", terminal=False)[-1]
    assert not set(remote) & set("!\n\\")


def test_a_command_that_cannot_be_unpacked_fails(ssh, monkeypatch, tmp_path):
    shell = ssh("bash")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "bash").symlink_to("/bin/bash")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{bare}")
    assert run(shell, "true")[0] != 0


def test_a_command_may_print_anything(tmp_path):
    (tmp_path / "exports").touch()
    assert run(LocalShell(tmp_path / "exports"), r"printf 'a\xff\n'", with_output=True) == (
        0,
        "a\N{REPLACEMENT CHARACTER}\n",
    )
