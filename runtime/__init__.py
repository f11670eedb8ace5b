"""Embedding with a bundle: small, fast, and without torch.

    from embedge.runtime import Embedder

    model = Embedder("bundle", precision="int8", task="code")
    queries = model.encode_query(["how do I sort a dict"])
    passages = model.encode_document(["sorted(d.items())", "d.keys()"])
    scores = model.similarity(queries, passages)  # float32 [1, 2]

This package imports neither torch, transformers, onnx nor peft, and nothing of embedge's other
parts.
"""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

from embedge.runtime.bundle.subset import subset_bundle
from embedge.runtime.embedder import Embedder
from embedge.runtime.errors import (
    BundleError,
    DeviceError,
    EmbedgeError,
    EmbedgeImportError,
    EmbedgeValueError,
    EmbedgeWarning,
    FingerprintError,
    ImageError,
    InferenceError,
    ManifestError,
    TextTooLongError,
)

__all__ = [
    "BundleError",
    "DeviceError",
    "Embedder",
    "EmbedgeError",
    "EmbedgeImportError",
    "EmbedgeValueError",
    "EmbedgeWarning",
    "FingerprintError",
    "ImageError",
    "InferenceError",
    "ManifestError",
    "TextTooLongError",
    "__version__",
    "subset_bundle",
]

try:
    __version__ = version("embedge")
except PackageNotFoundError:  # a folder of sources that was never installed
    __version__ = "0+unknown"

# ONNX Runtime, which is imported when it is first needed, reports nothing to its makers unless it was told to.
# From 1.29 on it does so by a thread of its own, for which a forked child waits forever at its end.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
