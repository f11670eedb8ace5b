"""A shell whose ``embedge`` runs in this process: to import the exporter takes longer than a tiny model's export."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from unittest import mock

__all__ = ["Shell"]

# Passes its standard streams on, and ends as the command did.
_COMMAND = """#!{python} -IS
import json, os, socket, sys

call = {{"arguments": sys.argv[1:], "folder": os.getcwd(), "environment": {{**os.environ}}}}
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({address!r})
    socket.send_fds(connection, [len(json.dumps(call)).to_bytes(4, "big")], [0, 1, 2])
    connection.sendall(json.dumps(call).encode())
    sys.exit(connection.recv(1)[0])
"""


class Shell:
    """Bash with an ``embedge`` that calls :func:`embedge.runtime.cli.main.main` here, one call at a time.

    Args:
        folder: takes the command and its socket; a short path, as sockets' are limited.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / "socket"))
        self._listener.listen()
        self._listener.settimeout(0.01)
        command = folder / "embedge"
        command.write_text(
            _COMMAND.format(python=sys.executable, address=str(folder / "socket")), "utf-8"
        )
        command.chmod(0o755)

    def close(self) -> None:
        self._listener.close()

    def run(self, code: str) -> subprocess.CompletedProcess[str]:
        """Run some code, which ends with the first command that fails."""
        path = f"{self._folder}{os.pathsep}{os.environ['PATH']}"
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
            with subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", code],
                env={**os.environ, "PATH": path},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
            ) as process:
                while process.poll() is None:
                    with contextlib.suppress(TimeoutError):
                        connection, _ = self._listener.accept()
                        with connection:
                            connection.sendall(bytes([_called(connection)]))
            output.seek(0)
            errors.seek(0)
            return subprocess.CompletedProcess(
                code, process.returncode, output.read(), errors.read()
            )


def _called(connection: socket.socket) -> int:
    """The exit status of the command that a client asks for."""
    size, descriptors, _, _ = socket.recv_fds(connection, 4, 3)
    with connection.makefile("rb") as stream:
        call = json.loads(stream.read(int.from_bytes(size, "big")))
    with _streams(*descriptors), contextlib.chdir(call["folder"]), warnings.catch_warnings():
        warnings.simplefilter("default")
        with mock.patch.dict(os.environ, call["environment"], clear=True):
            return _main(call["arguments"])


def _main(arguments: list[str]) -> int:
    from embedge.runtime.cli.main import main

    return main(arguments)


@contextlib.contextmanager
def _streams(*descriptors: int) -> Iterator[None]:
    """Makes descriptors the standard streams, and closes them."""
    modes: Mapping[str, str] = {"stdin": "r", "stdout": "w", "stderr": "w"}
    with contextlib.ExitStack() as stack:
        for (name, mode), descriptor in zip(modes.items(), descriptors, strict=True):
            file = stack.enter_context(open(descriptor, mode, encoding="utf-8"))
            stack.enter_context(mock.patch.object(sys, name, file))
        yield
