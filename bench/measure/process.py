"""Cold start, task switch and memory, each system alone in a fresh child process."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from embedge.bench.errors import BenchError

__all__ = ["child_error", "measure_process", "process_texts", "run_child"]

_CHILD = Path(__file__).with_name("child.py")


def measure_process(job: Mapping[str, Any], repeats: int = 3) -> dict[str, Any]:
    """Return what a child Python that does ``job`` measured of itself.

    The file cache is warm after the first repeat: cold start means a new process, not a new
    machine. Times are medians over the repeats, memory is the most of them.

    Args:
        job: ``system`` (``"embedge"`` or ``"torch"``) and what ``child.py`` reads for it; with ``pages``, paths of
            images, these are embedded in place of texts.
        repeats: child processes, one after the other.

    Returns:
        Milliseconds from the start of the process (``imported_ms``, ``first_vector_ms``, and the longest of the
        latter), of switches, and bytes by kind of memory after the first vector, after a batch of the first task,
        and after batches of all (empty where the system has no /proc).

    Raises:
        BenchError: if the child fails, with the last line it wrote.
    """
    runs = [_measured(job) for _ in range(repeats)]
    figures = {
        key: median(run[key] for run in runs)
        if isinstance(value, float)
        else {kind: max(run[key].get(kind, 0) for run in runs) for kind in value}
        for key, value in runs[-1].items()
    }
    return figures | {"first_vector_longest_ms": max(run["first_vector_ms"] for run in runs)}


def process_texts(texts: Sequence[str]) -> dict[str, Any]:
    """Return what of some texts a child embeds: one text, and a batch of 32 of medium length."""
    medium = [text for text in texts if 300 < len(text) < 900] or list(texts)
    return {"text": "how do I sort a dict", "batch": medium[:32]}


def run_child(arguments: Sequence[str], what: str) -> dict[str, Any]:
    """Return the JSON object that a child Python prints as its last line.

    Args:
        arguments: of Python.
        what: it does, for a message.

    Raises:
        BenchError: if it fails, with the last line it wrote.
    """
    command = [sys.executable, "-W", "ignore", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise child_error(what, done.returncode, done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def child_error(what: str, status: int, errors: str) -> BenchError:
    """Return the error about a child that failed, from its exit status and standard error."""
    lines = errors.strip().splitlines() or [f"exit status {status}"]
    return BenchError(f"{what} failed: {lines[-1]}")


def _measured(job: Mapping[str, Any]) -> dict[str, Any]:
    # Given as text and not as a module: importing embedge.bench would load torch.
    code = _CHILD.read_text(encoding="utf-8")
    started = json.dumps({**job, "started": time.monotonic()})
    return run_child(["-c", code, started], f"the child process for {job['system']}")
