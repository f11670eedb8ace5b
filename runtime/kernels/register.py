"""Registers the library of embedge's kernels in a session."""

from __future__ import annotations

from typing import Any

from embedge.runtime.host.fork import no_fork

__all__ = ["OPERATORS", "register"]

# Changes with what the library runs: graphs that were prepared with another do not open.
OPERATORS = "2"


def register(options: Any, library: str, *, panels: bool) -> None:
    """Lets the session that is opened with some options run the kernels of a library.

    Args:
        options: of the session.
        library: the library's file.
        panels: whether its weights lie in panels, see :mod:`embedge.runtime.kernels.repack`.
    """
    options.add_session_config_entry("embedge.weights", "panels" if panels else "rows")
    with no_fork():  # the system's loader has locks of its own
        options.register_custom_ops_library(library)
