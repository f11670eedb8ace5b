"""Embedding with a bundle: small, fast, and without torch.

    from embedge.runtime import Embedder

    model = Embedder("bundle", precision="int8", task="code")
    queries = model.encode_query(["how do I sort a dict"])
    passages = model.encode_document(["sorted(d.items())", "d.keys()"])
    scores = model.similarity(queries, passages)  # float32 [1, 2]

This package imports neither torch, transformers, onnx nor peft, and nothing of embedge's other
parts. A name is looked up when it is first used: a process that embeds a text loads what that takes, and no more.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from embedge.runtime.hub import pull_bundle, push_bundle
    from embedge.runtime.output_ranges import calibrate_ranges
    from embedge.runtime.scoring.quantization import (
        dequantize_embeddings,
        quantize_embeddings,
        ranges_of,
    )
    from embedge.runtime.scoring.rescoring import search_binary

    __version__: str

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
    "calibrate_ranges",
    "dequantize_embeddings",
    "pull_bundle",
    "push_bundle",
    "quantize_embeddings",
    "ranges_of",
    "search_binary",
    "subset_bundle",
]

# ONNX Runtime, which is imported when it is first needed, reports nothing to its makers unless it was told to.
# From 1.29 on it does so by a thread of its own, for which a forked child waits forever at its end.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_NOT_OF_ERRORS = {
    "Embedder": "embedder",
    "calibrate_ranges": "output_ranges",
    "dequantize_embeddings": "scoring.quantization",
    "pull_bundle": "hub",
    "push_bundle": "hub",
    "quantize_embeddings": "scoring.quantization",
    "ranges_of": "scoring.quantization",
    "search_binary": "scoring.rescoring",
    "subset_bundle": "bundle.subset",
}

if not TYPE_CHECKING:  # type checkers would take any name

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name == "__version__":
            value: Any = _installed_version()
        else:
            module = _NOT_OF_ERRORS.get(name, "errors")
            value = getattr(import_module(f"{__name__}.{module}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _installed_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("embedge")
    except PackageNotFoundError:  # a folder of sources that was never installed
        return "0+unknown"
