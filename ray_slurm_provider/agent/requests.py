"""What commands on the node may ask of its agent, over a Unix socket in Ray's private temporary directory.

A command in the head's allocation ends with its srun step, and everything that it started. What shall
outlive it, a tmux or a screen session, is therefore started by the agent. The socket hands the asking
command's standard streams over, and the answer is the exit code.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

RUN, END, RESTART = "run", "end", "restart"
_MESSAGE_BYTES = 262144
_NOT_UNDERSTOOD = 2


def socket_path(temp_dir: str, node_id: str) -> str:
    """Return where the agent of a node listens."""
    return f"{temp_dir}/agent-{node_id.rpartition('-')[2]}"


class Requests:
    """The socket, and the commands that run on request.

    Args:
        path: Where it listens; its directory is this user's alone.
        shell: File of the exports that commands start with.

    Attributes:
        asked: What was asked besides commands, in order.
    """

    def __init__(self, path: Path, shell: Path) -> None:
        self.path = path
        self.shell = shell
        self.asked: list[str] = []
        self._running: list[tuple[subprocess.Popen[bytes], socket.socket]] = []
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(self.path))
        self.listener.listen()
        self.listener.setblocking(False)

    def serve(self, _: object) -> bool:
        """Take one request; more may always come."""
        try:
            connection, _address = self.listener.accept()
        except OSError:
            return True
        connection.settimeout(1.0)
        try:
            message, streams, _flags, _sender = socket.recv_fds(connection, _MESSAGE_BYTES, 3)
        except OSError:
            connection.close()
            return True
        try:
            self._answer(connection, json.loads(message), streams)
        except (ValueError, KeyError, TypeError, OSError):
            _reply(connection, _NOT_UNDERSTOOD)
        finally:
            for stream in streams:
                os.close(stream)
        return True

    def reap(self) -> None:
        """Answer for the commands that have ended."""
        still = []
        for child, connection in self._running:
            if child.poll() is None:
                still.append((child, connection))
            else:
                _reply(connection, child.returncode)
        self._running = still

    def close(self) -> None:
        """Stop listening."""
        self.listener.close()
        with contextlib.suppress(OSError):
            os.unlink(self.path)  # noqa: PTH108 the path may be bytes-long, not a file to look at

    def _answer(self, connection: socket.socket, request: dict[str, str], streams: list[int]) -> None:
        if _user_of(connection) != os.getuid():
            _reply(connection, _NOT_UNDERSTOOD)
        elif request["do"] == RUN:
            child = subprocess.Popen(
                ["bash", "-c", f'. "$1" && cd && {{ {request["command"]}\n}}', "bash", str(self.shell)],
                stdin=streams[0],
                stdout=streams[1],
                stderr=streams[2],
                start_new_session=True,
            )
            self._running.append((child, connection))
        elif request["do"] in {END, RESTART}:
            self.asked.append(request["do"])
            _reply(connection, 0)
        else:
            _reply(connection, _NOT_UNDERSTOOD)


def ask(path: str, do: str, command: str = "") -> int:
    """Ask an agent and return the exit code of what it did.

    Raises:
        OSError: No agent listens there.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(path)
        socket.send_fds(connection, [json.dumps({"do": do, "command": command}).encode()], [0, 1, 2])
        return int(connection.recv(64) or b"1")


def _reply(connection: socket.socket, code: int) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(str(code if code >= 0 else 128 - code).encode())
    connection.close()


def _user_of(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])
