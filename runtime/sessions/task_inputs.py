"""The inputs of a shared graph that are a task's, in memory as its kernels read them fastest."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from embedge.runtime.bundle.task_tensors import TaskTensors
from embedge.runtime.host.onnxruntime import load_onnxruntime

__all__ = ["TaskInputs", "task_inputs"]

TaskInputs: TypeAlias = Mapping[str, Any]
"""ONNX Runtime's values by the name of an input."""

_LINE = 64  # bytes of a cache line, and of a line of panels


def task_inputs(tensors: TaskTensors) -> TaskInputs:
    """Copies of some tensors, each at the start of a cache line, as a session takes them without copying again.

    Args:
        tensors: of a task.
    """
    value_of = load_onnxruntime().OrtValue.ortvalue_from_numpy
    size = sum(_lines(array.nbytes) for array in tensors.arrays.values())
    if not size:
        return {}
    memory = np.frombuffer(mmap.mmap(-1, size), np.uint8)  # given back whole, unlike freed blocks
    values, start = {}, 0
    for name, array in tensors.arrays.items():
        place = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        place[...] = array
        values[name] = value_of(place)
        start += _lines(array.nbytes)
    return values


def _lines(size: int) -> int:
    """Bytes of the cache lines that some bytes take."""
    return -(-size // _LINE) * _LINE
