"""What a forked child starts anew, and when none is forked.

A child has none of its parent's threads, but it has what waits for them. A session that the parent opened
may wait forever when the child runs it, and ends the child when it is closed there. So the child leaves
the parent's sessions alone and opens its own.

A lock of ONNX Runtime, or of the system's loader, that another thread held at the fork stays locked in the
child. So ``os.fork`` waits until the sessions that other threads are opening are open: milliseconds for
small graphs, seconds for large ones.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from contextlib import AbstractContextManager, suppress
from typing import Any, Protocol

__all__ = ["keep_forever", "no_fork", "restart_after_fork"]

_TOKENIZERS = "TOKENIZERS_PARALLELISM"


class _Restarting(Protocol):
    def restart(self) -> None: ...


class _Gate:
    """A lock per thread, all of which a fork takes: threads do not wait for each other."""

    def __init__(self) -> None:
        self._own = threading.local()
        self._every: weakref.WeakSet[Any] = weakref.WeakSet()
        self._adding = threading.RLock()
        self._taken: list[Any] = []

    def lock(self) -> Any:
        """The calling thread's."""
        own = getattr(self._own, "lock", None)
        if own is None:
            own = threading.RLock()
            with self._adding:
                self._every.add(own)
            self._own.lock = own
        return own

    def take_all(self) -> None:
        """Before a fork: all but the own, which the child's only thread may go on holding."""
        self._adding.acquire()
        own = getattr(self._own, "lock", None)
        for lock in list(self._every):
            if lock is not own:
                self._taken.append(lock)
                lock.acquire()

    def give_all(self) -> None:
        """In the parent, after it."""
        while self._taken:
            with suppress(RuntimeError):  # not taken: an interrupt came before
                self._taken.pop().release()
        with suppress(RuntimeError):
            self._adding.release()


_owners: weakref.WeakSet[_Restarting] = weakref.WeakSet()
_gate = _Gate()


def no_fork() -> AbstractContextManager[Any]:
    """While the block runs, no other thread forks; may be nested."""
    lock: AbstractContextManager[Any] = _gate.lock()
    return lock


def restart_after_fork(owner: _Restarting) -> None:
    """Calls ``owner.restart()`` in every child that is forked while the owner lives."""
    _owners.add(owner)


def keep_forever(thing: object) -> None:
    """Never destroys an object, not when the interpreter ends either."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _before() -> None:
    _gate.take_all()


def _in_parent() -> None:
    _gate.give_all()


def _in_child() -> None:
    global _gate  # noqa: PLW0603
    _gate = _Gate()
    owners = list(_owners)
    for owner in owners:
        owner.restart()
    # tokenizers does without its threads in a child by itself, unless it was told to use them.
    if owners and _TOKENIZERS in os.environ:
        os.environ[_TOKENIZERS] = "false"


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
