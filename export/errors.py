"""What export can refuse, as a small tree.

    EmbedgeError                 (embedge.runtime)
    └── ExportError              an export could not be made
        ├── CheckpointError      the model folder, its weights or its settings
        └── AdapterError         a PEFT adapter, by itself or against this model

The last two are also ValueErrors.

Every message names the file or tensor, what was expected, what was found, and what to do next.
"""

from __future__ import annotations

from embedge.runtime.errors import EmbedgeError

__all__ = ["AdapterError", "CheckpointError", "ExportError"]


class ExportError(EmbedgeError):
    """An export could not be made."""


class CheckpointError(ExportError, ValueError):
    """A model folder, its weights or its settings are missing, damaged or not supported."""


class AdapterError(ExportError, ValueError):
    """An adapter is missing, damaged, not supported, or does not fit the model."""
