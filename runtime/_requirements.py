"""ONNX Runtime has to be installed exactly once: its two packages overwrite each other's files."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

from embedge.runtime._errors import EmbedgeImportError

__all__ = ["check_onnxruntime", "own_version", "without_telemetry"]

_PACKAGES = ("onnxruntime", "onnxruntime-gpu")


def check_onnxruntime() -> None:
    """Refuses to go on without ONNX Runtime, or with two of them.

    Raises:
        EmbedgeImportError: with the command that mends it.
    """
    found = [package for package in _PACKAGES if _version(package) is not None]
    if not found:
        raise EmbedgeImportError(
            'ONNX Runtime is not installed; run `pip install "embedge[cpu]"`, or '
            '`pip install "embedge[gpu]"` for CUDA'
        )
    if len(found) > 1:
        raise EmbedgeImportError(
            f"{' and '.join(found)} are both installed and overwrite each other's files; run "
            f'`pip uninstall -y {" ".join(found)}` and then `pip install "embedge[cpu]"`, or '
            '`pip install "embedge[gpu]"` for CUDA'
        )


def without_telemetry() -> None:
    """Lets ONNX Runtime, if it is not imported yet, report nothing to its makers, unless it was told to.

    From 1.29 on it does so by a thread that starts with the import and for which a forked child waits
    forever at its end.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def own_version() -> str:
    """The installed version of embedge, "0+unknown" when it runs from a source folder."""
    return _version("embedge") or "0+unknown"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
