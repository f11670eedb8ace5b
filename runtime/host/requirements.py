"""What embedge asks of its environment, and what it is called there."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

__all__ = ["own_version", "without_telemetry"]


def without_telemetry() -> None:
    """Lets ONNX Runtime, if it is not imported yet, report nothing to its makers, unless it was told to.

    From 1.29 on it does so by a thread that starts with the import and for which a forked child waits
    forever at its end.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def own_version() -> str:
    """The installed version of embedge, "0+unknown" when it runs from a source folder."""
    try:
        return version("embedge")
    except PackageNotFoundError:
        return "0+unknown"
