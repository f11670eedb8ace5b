"""The model card of a bundle, made from its manifest (``runtime/bundle/model_card.py``)."""

from __future__ import annotations

import os
from pathlib import Path

from embedge.runtime.bundle.contract import CARD
from embedge.runtime.bundle.files import JSON_BYTES, read_regular_file
from embedge.runtime.bundle.manifest import Manifest
from embedge.runtime.bundle.model_card import model_card, renewed_card
from embedge.runtime.bundle.writing import replace_file


def write_card(folder: Path, manifest: Manifest) -> None:
    """Write the model card; one that somebody else has written in stays."""
    file = folder / CARD
    card: str | None = model_card(manifest)
    if os.path.lexists(file):
        try:
            card = renewed_card(read_regular_file(file, JSON_BYTES).decode(), manifest)
        except (OSError, UnicodeDecodeError):
            return
    if card is not None:
        replace_file(file, card)
