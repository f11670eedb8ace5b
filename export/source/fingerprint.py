"""What identifies a source in a bundle's manifest: hashes that do not depend on where its files lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from embedge.export.source.dense import DenseLayer
from embedge.export.source.safetensors_file import SafetensorsFile

__all__ = ["dense_sha256", "files_sha256", "weights_sha256"]

_CHUNK_BYTES = 1 << 22


def weights_sha256(files: Mapping[str, SafetensorsFile]) -> str:
    """Return the hash of a model's tensors: names, dtypes, shapes and bytes in the order of the names.

    It does not depend on how the tensors are split into files or ordered in them.

    Args:
        files: the file of each tensor.
    """
    digest = hashlib.sha256()
    for key, file in sorted(files.items(), key=lambda item: item[0]):
        digest.update(json.dumps([key, file.dtype(key), file.shape(key)]).encode() + b"\n")
        for chunk in file.chunks(key):
            digest.update(chunk)
    return digest.hexdigest()


def dense_sha256(layers: Sequence[DenseLayer]) -> str | None:
    """Return the hash of Dense layers, ``None`` without any."""
    digest = hashlib.sha256()
    for layer in layers:
        digest.update(f"{layer.activation} {layer.weight.shape}".encode())
        for array in (layer.weight, layer.bias):
            digest.update(b"-" if array is None else array.tobytes())
        if layer.residual is not None:
            digest.update(layer.residual.tobytes())
    return digest.hexdigest() if layers else None


def files_sha256(*files: Path) -> str:
    """Return one hash of the names, sizes and contents of ``files``: an adapter's two."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as content:
            while chunk := content.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()
