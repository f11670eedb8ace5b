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

from embedge.runtime.bundle.subset import subset_bundle
from embedge.runtime.embedder import Embedder
from embedge.runtime.errors import (
    BundleError,
    DeviceError,
    EmbedgeError,
    EmbedgeImportError,
    EmbedgeValueError,
    EmbedgeWarning,
    ImageError,
    InferenceError,
    ManifestError,
    TextTooLongError,
)
from embedge.runtime.host.requirements import own_version, without_telemetry

__all__ = [
    "BundleError",
    "DeviceError",
    "Embedder",
    "EmbedgeError",
    "EmbedgeImportError",
    "EmbedgeValueError",
    "EmbedgeWarning",
    "ImageError",
    "InferenceError",
    "ManifestError",
    "TextTooLongError",
    "__version__",
    "subset_bundle",
]

__version__ = own_version()

without_telemetry()  # ONNX Runtime itself is imported when it is first needed
