"""What a labelled set searches: texts, or images of pages."""

from __future__ import annotations

from pathlib import Path

__all__ = ["Document"]

Document = str | bytes | Path  # a text, the bytes of an image file, or the path of one
