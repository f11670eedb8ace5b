"""What the figures were taken on: processor, kernels, cores, memory, package versions."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
import torch

from embedge.runtime.host.processor import instruction_sets, processor_name
from embedge.runtime.kernels.library import describe_kernels

__all__ = ["machine", "versions"]

_PACKAGES = (
    *("embedge", "numpy", "onnxruntime", "torch", "transformers", "peft"),
    *("optimum-onnx", "openvino", "nncf"),
)
# What decides which kernels run.
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


def machine(threads: int, device: str = "cpu") -> dict[str, Any]:
    """Return the processor's name and instruction sets, whose kernels run, cores, memory, the load, and the
    GPU's name.

    Args:
        threads: threads each system is given.
        device: what they run on; ``"gpu"`` is there for "cuda".
    """
    flags = instruction_sets()
    gpu = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    return gpu | {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
        "instructions": [flag for flag in _FLAGS if flag in flags],
        "kernels": describe_kernels(),
        "cores": psutil.cpu_count(),
        "threads": threads,
        "memory_bytes": psutil.virtual_memory().total,
        "load_1_min": round(psutil.getloadavg()[0], 2),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Return the installed versions of what takes part."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
