"""What a forked child starts anew.

A child has none of its parent's threads, but what waits for them. ONNX Runtime's sessions are such things:
one that the parent opened may wait forever when it runs in the child, and ends the child when it is
closed there. So the child leaves the parent's alone and opens its own.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import Protocol

__all__ = ["keep_forever", "restart_after_fork"]

_TOKENIZERS = "TOKENIZERS_PARALLELISM"


class _Restarting(Protocol):
    def restart(self) -> None: ...


_owners: weakref.WeakSet[_Restarting] = weakref.WeakSet()


def restart_after_fork(owner: _Restarting) -> None:
    """Calls ``owner.restart()`` in every child that is forked while the owner lives."""
    _owners.add(owner)


def keep_forever(thing: object) -> None:
    """Never destroys an object, not when the interpreter ends either."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _restart() -> None:
    owners = list(_owners)
    for owner in owners:
        owner.restart()
    # tokenizers does without its threads in a child by itself, unless it was told to use them.
    if owners and _TOKENIZERS in os.environ:
        os.environ[_TOKENIZERS] = "false"


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_restart)
