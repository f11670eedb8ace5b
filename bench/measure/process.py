"""Cold start, task switch and memory, each system alone in a fresh child process."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from embedge.bench.errors import BenchError

__all__ = ["measure_process"]

_CHILD = Path(__file__).with_name("child.py")


def measure_process(job: Mapping[str, Any], repeats: int = 3) -> dict[str, Any]:
    """Return what a child Python that does ``job`` measured of itself.

    The file cache is warm after the first repeat: cold start means a new process, not a new
    machine. Times are medians over the repeats, memory is the last one's.

    Args:
        job: ``system`` (``"embedge"`` or ``"torch"``) and what ``_child.py`` reads for it.
        repeats: child processes, one after the other.

    Returns:
        Milliseconds from the start of the process (``imported_ms``, ``first_vector_ms``), of
        switches, and bytes by kind of memory after the first vector and after batches (empty where
        the system has no /proc).

    Raises:
        BenchError: if the child fails, with the last line it wrote.
    """
    runs = [_child(job) for _ in range(repeats)]
    return {
        key: median(run[key] for run in runs) if isinstance(value, float) else value
        for key, value in runs[-1].items()
    }


def _child(job: Mapping[str, Any]) -> dict[str, Any]:
    # Given as text and not as a module: importing embedge.bench would load torch.
    command = [sys.executable, "-W", "ignore", "-c", _CHILD.read_text(encoding="utf-8")]
    done = subprocess.run(
        [*command, json.dumps({**job, "started": time.monotonic()})],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise BenchError(f"the child process for {job['system']} failed: {lines[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
