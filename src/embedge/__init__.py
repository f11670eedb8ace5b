"""Small, fast ONNX graphs of embedding models, one per task, that run without torch.

    from embedge import Embedder, export_bundle

    export_bundle("path/to/model", adapters={"code": "adapters/code"}, out="bundle")
    model = Embedder("bundle", task="code")
    queries = model.encode_query(["how do I sort a dict"])

A name is looked up in ``embedge.runtime`` or ``embedge.export`` when it is first used; importing this
package loads neither.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embedge.export import (
        AdapterError,
        CheckpointError,
        ExportError,
        export_bundle,
        fit_maps,
        save_pretrained,
    )
    from embedge.runtime import (
        BundleError,
        DeviceError,
        Embedder,
        EmbedgeError,
        EmbedgeImportError,
        EmbedgeValueError,
        EmbedgeWarning,
        FingerprintError,
        ImageError,
        InferenceError,
        ManifestError,
        TextTooLongError,
        calibrate_ranges,
        dequantize_embeddings,
        pull_bundle,
        push_bundle,
        quantize_embeddings,
        ranges_of,
        search_binary,
        subset_bundle,
    )

    __version__: str

__all__ = [
    "AdapterError",
    "BundleError",
    "CheckpointError",
    "DeviceError",
    "Embedder",
    "EmbedgeError",
    "EmbedgeImportError",
    "EmbedgeValueError",
    "EmbedgeWarning",
    "ExportError",
    "FingerprintError",
    "ImageError",
    "InferenceError",
    "ManifestError",
    "TextTooLongError",
    "__version__",
    "calibrate_ranges",
    "dequantize_embeddings",
    "export_bundle",
    "fit_maps",
    "pull_bundle",
    "push_bundle",
    "quantize_embeddings",
    "ranges_of",
    "save_pretrained",
    "search_binary",
    "subset_bundle",
]

_OF_EXPORT = frozenset(
    {
        "AdapterError",
        "CheckpointError",
        "ExportError",
        "export_bundle",
        "fit_maps",
        "save_pretrained",
    }
)
_PARTS = frozenset({"bench", "export", "integrations", "quant", "runtime"})


if not TYPE_CHECKING:  # type checkers would take any name

    def __getattr__(name: str) -> Any:
        if name in _PARTS:
            return import_module(f"embedge.{name}")
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name == "__version__":
            value: Any = _installed_version()
        else:
            part = "embedge.export" if name in _OF_EXPORT else "embedge.runtime"
            value = getattr(import_module(part), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _installed_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("embedge")
    except PackageNotFoundError:  # it runs from a source folder
        return "0+unknown"
