"""The command in tests: its input, its one line of error, the vectors that it printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Capture = pytest.CaptureFixture[str]
CaptureBytes = pytest.CaptureFixture[bytes]
SetStdin = Callable[[bytes], None]


def error_line(capsys: Capture) -> str:
    """The one line on standard error."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def vectors_of(jsonl: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.array([json.loads(line)["embedding"] for line in jsonl.splitlines()], np.float32)


def program(arguments: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Runs the real program; names in capitals are its environment's variables."""
    variables = {name: options.pop(name) for name in list(options) if name.isupper()}
    path = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [sys.executable, "-m", "embedge.runtime", *arguments],
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path, **variables},
        timeout=600,
        check=False,
        **options,
    )
