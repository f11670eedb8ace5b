"""What the writer of a bundle and its readers agree on: names, limits, and the steps that rows are padded to."""

from __future__ import annotations

__all__ = [
    "CARD",
    "EXACT_OPTION",
    "FORMAT_VERSION",
    "INLINE_BYTES",
    "INTEGER_PRECISIONS",
    "LONG_TOKENS",
    "MANIFEST",
    "MAPS",
    "ONNXRUNTIME",
    "PREPARED",
    "REPORT",
    "SHARED_CONSTANTS",
    "UNPACKED",
    "UNPACKED_PRECISION",
    "VISION",
]

FORMAT_VERSION = "1.8"  # of the manifest, see embedge.runtime.bundle.manifest
EXACT_OPTION = (
    "session.x64quantprecision"  # ONNX Runtime's; "1": exact 8-bit products on any x86-64
)
ONNXRUNTIME = ">=1.30,<1.34"  # versions that compute these graphs right, and were tested

MANIFEST, CARD = "manifest.json", "README.md"  # files in a bundle's folder
SHARED_CONSTANTS = (
    "shared.constants.safetensors"  # beside a graph that tasks share, for the export alone
)
REPORT = "report.json"  # what `embedge bench --record` adds to them
PREPARED = "prepared"  # the folder of what `embedge prepare` adds to them

MAPS = "maps"  # what the graph of task maps is called among those of the tasks
VISION = "vision"  # what the graph of the vision tower is called among those of the tasks
UNPACKED_PRECISION = "int4-unpacked"  # stores 4-bit weights, runs them as 8-bit ones
UNPACKED = "unpacked"  # where its graphs say that weights lie: a file that does not exist
INTEGER_PRECISIONS = ("int8", "int4", UNPACKED_PRECISION)  # embedge's kernels serve their matmuls

INLINE_BYTES = 4096  # tensors of up to as many bytes lie in the graph itself
LONG_TOKENS = 512  # rows of as many tokens are never padded: attention in blocks builds on it
