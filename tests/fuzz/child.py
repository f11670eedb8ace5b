"""Runs a function in a forked child and says how it ended: nothing it does can stop the caller."""

from __future__ import annotations

import os
import pickle
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedge.runtime import EmbedgeError

__all__ = ["FAULTS", "Outcome", "Wrong", "run"]

FAULTS = ("foreign", "crash", "hang", "outside", "wrong")
_MEMORY = 12 << 30  # of address space: a read without a bound ends as a MemoryError
_WRITES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate")


@dataclass(frozen=True)
class Outcome:
    """How a child ended.

    Attributes:
        kind: "right", "refused" (an ``EmbedgeError``), or one of ``FAULTS``: another exception, death by a
            signal, no end in time, a file outside of what it may touch, a wrong result.
        detail: the message, the traceback or the result.
    """

    kind: str
    detail: str

    @property
    def is_fault(self) -> bool:
        return self.kind in FAULTS


class Wrong(Exception):
    """Raised by a checked function whose result is not what it has to be."""


def run(
    function: Callable[[], Any],
    *,
    seconds: float = 60,
    root: Path | None = None,
    allowed: Sequence[Path] = (),
) -> Outcome:
    """Call ``function`` in a fork of this process.

    Args:
        function: the work; its result, as text, is the outcome's detail.
        seconds: after which the child is killed.
        root: a scratch folder: nothing may be written outside of ``allowed``, and nothing of ``root``
            may be opened outside of it.
        allowed: the folders and files (and what lies in them) that the function is about.
    """
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads, in Python 3.12
        child = os.fork()
    if child == 0:
        os.close(reading)
        status = _in_child(function, writing, root, allowed)
        os._exit(status)
    os.close(writing)
    answer = None
    try:
        answer = _answer(reading, time.monotonic() + seconds)
    finally:
        os.close(reading)
        if answer is None:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if answer is None:
        return Outcome("hang", f"killed after {seconds:g} s")
    if os.WIFSIGNALED(status):
        return Outcome("crash", signal.Signals(os.WTERMSIG(status)).name)
    return Outcome(*pickle.loads(answer)) if answer else Outcome("crash", f"exit status {status}")


def _answer(reading: int, end: float) -> bytes | None:
    """What the child writes until it closes its pipe; ``None`` where that takes too long."""
    parts: list[bytes] = []
    while True:
        ready, _, _ = select.select([reading], [], [], max(0, end - time.monotonic()))
        if not ready:
            return None
        part = os.read(reading, 1 << 16)
        if not part:
            return b"".join(parts)
        parts.append(part)


def _in_child(
    function: Callable[[], Any], writing: int, root: Path | None, allowed: Sequence[Path]
) -> int:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    outside: list[str] = []
    if root is not None:
        _watch(root, allowed, outside)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = ("right", str(function()))
    except Wrong as error:
        outcome = ("wrong", str(error))
    except EmbedgeError as error:
        outcome = ("refused", f"{type(error).__name__}: {error}")
    except BaseException:
        outcome = ("foreign", traceback.format_exc())
    if outside and outcome[0] != "foreign":
        outcome = ("outside", "; ".join(outside))
    kind, detail = outcome
    os.write(writing, pickle.dumps((kind, detail[:20_000])))
    return 0


def _watch(root: Path, allowed: Sequence[Path], outside: list[str]) -> None:
    """Note every path outside of ``allowed`` that Python opens below ``root``, or changes anywhere."""
    tempfile.tempdir = os.path.join(root, "temporary")
    os.makedirs(tempfile.tempdir, exist_ok=True)
    places = [*map(str, allowed), tempfile.tempdir, os.devnull]
    inside = tuple(os.path.realpath(path) for path in places)
    scratch = os.path.realpath(root)

    def is_in(path: str, folder: str) -> bool:
        return path == folder or path.startswith(f"{folder}/")

    def note(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        elif event in _WRITES and not (event == "os.mkdir" and os.path.isdir(args[0])):
            path, writes = args[0], True
        else:
            return
        if not isinstance(path, str | bytes | os.PathLike):
            return
        folder = args[2 if event == "os.rename" else -1] if event in _WRITES else -1
        at = f"/proc/self/fd/{folder}" if isinstance(folder, int) and folder >= 0 else os.getcwd()
        real = os.path.realpath(os.path.join(at, os.fsdecode(path)))
        if any(is_in(real, folder) for folder in inside) or real.startswith("/proc/"):
            return
        if writes or (is_in(real, scratch) and real != scratch):  # a folder is opened to be flushed
            outside.append(f"{event} {real}")

    sys.addaudithook(note)
