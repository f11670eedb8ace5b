"""Classes of arithmetic: which operators compute the vectors of a graph on a machine.

On one machine vectors are the same to the bit, whatever the batch. Within a class other instruction sets add float32
numbers in another order. Between classes some operator rounds in another way. Both move values that are rounded to
8 bits by a step here and there; docs/explanation/kernels.md has what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping

from embedge.runtime.kernels.library import kernel_library
from embedge.runtime.kernels.register import uses_bfloat16

__all__ = ["CLASSES", "numerics_class"]

FLOAT32, ONNXRUNTIME, EMBEDGE, BFLOAT16, CUDA = (
    "cpu-float32",
    "cpu-onnxruntime",
    "cpu-embedge",
    "cpu-embedge-bfloat16",
    "cuda",
)
CLASSES: Mapping[str, str] = {
    FLOAT32: "float32 throughout, by ONNX Runtime",
    ONNXRUNTIME: "integer matmuls, the rest in float32, by ONNX Runtime",
    EMBEDGE: "integer matmuls, silu and attention by embedge's kernels, attention in float32",
    BFLOAT16: "the same, attention in bfloat16, where the processor multiplies it",
    CUDA: "what the precision's graphs have, by ONNX Runtime on a GPU",
}


def numerics_class(*, device: str, integers: bool, attention: bool) -> str:
    """The class of a graph's arithmetic on this machine, a key of :data:`CLASSES`.

    Args:
        device: what runs it: "cpu", or "cuda" with or without a number.
        integers: whether its precision's matmuls are of integers on a CPU.
        attention: whether its attention is a function of embedge's.
    """
    if device.startswith(CUDA):
        return CUDA
    if not integers:
        return FLOAT32
    library = kernel_library()
    if library is None:
        return ONNXRUNTIME
    return BFLOAT16 if attention and uses_bfloat16(library) else EMBEDGE
