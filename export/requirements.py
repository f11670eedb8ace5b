"""The packages of the ``export`` extra."""

from __future__ import annotations

from importlib import util

from embedge.runtime.errors import EmbedgeImportError
from embedge.runtime.host.install_advice import install_command

_PACKAGES = ("onnx", "safetensors", "scipy", "threadpoolctl")


def check_requirements() -> None:
    """Raise :class:`EmbedgeImportError` with the install command where a package is missing."""
    missing = [name for name in _PACKAGES if util.find_spec(name) is None]
    if missing:
        raise EmbedgeImportError(
            f"embedge.export needs {', '.join(missing)}, which is not installed; "
            f"run: {install_command('export')}"
        )
