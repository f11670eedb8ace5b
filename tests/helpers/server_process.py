"""The real server: its process, its address, and what it says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.serving import httpx

__all__ = ["BODY", "Server", "serving"]

BODY = {"model": "bundle:code", "input": "w1 w2"}


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str
    log: Path

    def embed(self, **fields: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/embeddings", json=BODY | fields, timeout=60)

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)

    def said(self, text: str) -> None:
        """Waits until the server has said something."""
        for _ in range(600):
            if text in self.log.read_text():
                return
            time.sleep(0.05)
        raise AssertionError(f"{text!r} is not in {self.log.read_text()!r}")


@contextmanager
def serving(log: Path, *arguments: str, **environment: str) -> Iterator[Server]:
    path = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", "embedge", "serve", "--port", "0", *arguments]
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "PYTHONPATH": path, **environment},
        ) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("embedge: listening at http://127.0.0.1:"), log.read_text()
            yield Server(process, line.split()[-1], log)
        finally:
            process.kill()
