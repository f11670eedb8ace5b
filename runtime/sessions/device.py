"""Choosing between the processor and a CUDA device.

Rules:
    * "cpu" and "cuda" are taken at their word; a precision without kernels there is refused.
    * "auto" takes cuda where the precision has kernels for it and the provider really loads, else
      cpu.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from embedge.runtime.errors import DeviceError, EmbedgeValueError, log_info
from embedge.runtime.host.fork import no_fork
from embedge.runtime.host.onnxruntime import command_for_cuda, load_onnxruntime, open_session
from embedge.runtime.host.saturation import probe_model

__all__ = ["DEVICES", "PROVIDERS", "choose_device", "split_device"]

DEVICES = ("auto", "cpu", "cuda")
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def split_device(device: Any) -> tuple[str, int]:
    """A device's kind, one of :data:`DEVICES`, and its number: ("cuda", 1) of "cuda:1".

    Raises:
        EmbedgeValueError: for an unknown device.
    """
    found = re.fullmatch(r"(auto|cpu|cuda)|(cuda):([0-9]{1,4})", str(device))
    if found is None:
        raise EmbedgeValueError(
            f"device is {device!r}; expected one of {', '.join(DEVICES)}, or cuda:N for a GPU's number",
            arguments=["device"],
        )
    return found[1] or found[2], int(found[3] or 0)


def choose_device(requested: str, precision: str, supported: Sequence[str]) -> str:
    """The device to run on, "cpu", "cuda" or "cuda:N".

    Args:
        requested: "auto", "cpu", "cuda" or "cuda:N".
        precision: name of the precision, for messages.
        supported: devices that have kernels for it.

    Raises:
        EmbedgeValueError: for an unknown device, or one without kernels for the precision.
        DeviceError: if CUDA was asked for and does not work here.
    """
    kind, index = split_device(requested)
    if kind != "auto" and kind not in supported:
        raise EmbedgeValueError(
            f"precision {precision!r} does not run on {kind}; it runs on "
            f"{', '.join(supported) or 'no device'}: choose another precision or device"
        )
    if kind == "cpu":
        return "cpu"
    why_not = cuda_problem(index) if "cuda" in supported else "the precision has no CUDA kernels"
    if kind == "cuda":
        if why_not:
            raise DeviceError(f"device {str(requested)!r}: {why_not}")
        return str(requested)
    if why_not and "cpu" not in supported:
        raise DeviceError(f"precision {precision!r} runs on cuda only: {why_not}")
    chosen = "cpu" if why_not else "cuda"
    log_info("device auto: %s for %s%s", chosen, precision, f" ({why_not})" if why_not else "")
    return chosen


def cuda_problem(index: int = 0) -> str | None:
    """Why the CUDA provider cannot be used on a GPU, with the fix; ``None`` if it can.

    A provider that is listed may still fail to load its libraries, upon which ONNX Runtime would
    fall back to the processor with no more than a log line. So a tiny session is opened.
    """
    onnxruntime = load_onnxruntime()
    cuda = PROVIDERS["cuda"]
    if cuda not in onnxruntime.get_available_providers():
        return f"the installed ONNX Runtime has no CUDA provider; run {command_for_cuda()}"
    if hasattr(onnxruntime, "preload_dlls"):
        with no_fork(), _without_print(onnxruntime):
            onnxruntime.preload_dlls()  # from NVIDIA's pip packages, where they are installed
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        on_gpu = (cuda, {"device_id": str(index)})
        session = open_session(probe_model(), options, [on_gpu, PROVIDERS["cpu"]])
        loaded = cuda in session.get_providers()
    except Exception:  # ONNX Runtime's errors have no common base
        loaded = False
    if loaded:
        return None
    which = f" on GPU {index}" if index else ""
    return (
        f"the CUDA provider is installed but does not load{which}{_missing_library()}; check the driver "
        "and the GPUs' numbers with `nvidia-smi` and install CUDA's and cuDNN's libraries with "
        '`pip install "onnxruntime-gpu[cuda,cudnn]"`'
    )


@contextmanager
def _without_print(module: Any) -> Iterator[None]:
    """A module that says nothing on standard output, where a program may be writing vectors."""
    module.print = lambda *args, **options: None
    try:
        yield
    finally:
        del module.print


def _missing_library() -> str:
    """What the system's loader says of the provider's library, in brackets; empty if it loads."""
    folder = Path(load_onnxruntime().__file__).parent / "capi"
    for library in sorted(folder.glob("*onnxruntime_providers_cuda.*")):
        try:
            ctypes.CDLL(str(library))
        except OSError as error:
            return f" ({error})"
    return ""
