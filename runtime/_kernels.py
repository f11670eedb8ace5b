"""embedge's own kernels for int8 graphs, where they were built and the processor has what they need.

The library of ``runtime/native`` takes the place of ONNX Runtime's kernel for ``MatMulIntegerToFloat`` in a
session, and runs the functions of int8 graphs (:mod:`embedge.export._functions`) as one operator each: the
same results to the bit, faster most of all for short texts (bench/LOG.md). It is compiled when embedge is
installed and a C compiler is at hand; without it, on other processors and where
``EMBEDGE_KERNELS=onnxruntime`` is set, sessions are ONNX Runtime's alone, which inlines the functions.

Products read weights in panels of 16 columns, int8 ``[columns / 16, depth / 4, 16, 4]``. The kernel makes
them itself from a bundle's ``[depth, columns]``, unless the session says that they lie in panels already:
:func:`in_panels`, for weights that are made when a session opens, and in prepared graphs.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import mmap
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedge.runtime._cpu import has_amx
from embedge.runtime._errors import EmbedgeWarning
from embedge.runtime._onnx_file import INLINE_BYTES
from embedge.runtime._onnx_model import FLOAT, UINT8, one_node_model

__all__ = [
    "PANELS",
    "describe_kernels",
    "in_panels",
    "kernel_library",
    "own_kernels",
    "use_own_kernels",
]

PANELS = "panels of 16 x 4"  # the layout, as prepared graphs record it
_SWITCH, _OFF = "EMBEDGE_KERNELS", "onnxruntime"
_LANES, _GROUP = 16, 4  # columns of a panel, rows of a line
_OUTPUTS = {"QuantizeRows": 2, "QuantizeHalves": 5}  # of an operator


def own_kernels() -> bool:
    """Whether 8-bit graphs run with embedge's kernels on this processor."""
    return kernel_library() is not None


def kernel_library() -> str | None:
    """The library's file; ``None``: ONNX Runtime's kernels are used."""
    return _find()[0]


def describe_kernels() -> str:
    """Whose kernels run 8-bit graphs here, and why: a line for people."""
    return _find()[1]


@functools.cache
def _find() -> tuple[str | None, str]:
    """The library, found and tried once per process, and what :func:`describe_kernels` says of it.

    With AMX, ONNX Runtime multiplies whole tiles, which these kernels do not.
    """
    theirs = "ONNX Runtime's"
    if os.environ.get(_SWITCH) == _OFF:
        return None, f"{theirs}: {_SWITCH}={_OFF} is set"
    if has_amx():
        return None, f"{theirs}, which use AMX"
    found = importlib.util.find_spec("embedge.runtime._native")
    if found is None or found.origin is None:
        return (
            None,
            f"{theirs}: embedge's own are for Linux on x86-64, and take a C compiler to install",
        )
    file = found.origin
    try:
        if not ctypes.CDLL(file).embedge_kernels_run_here():
            return (
                None,
                f"{theirs}: embedge's own take AVX512-VNNI, which the processor does not have",
            )
        if _is_right(file):
            return file, "embedge's own, equal to ONNX Runtime's to the bit"
        problem = "it computes wrong values"
    except Exception as error:  # ONNX Runtime's errors have no common base
        problem = " ".join(str(error).split())
    warnings.warn(
        f"{file}: not used: {problem}; ONNX Runtime's own kernels run instead, slower; install embedge "
        f"again, or set {_SWITCH}={_OFF} to keep it out",
        EmbedgeWarning,
        stacklevel=2,
    )
    return None, f"{theirs}: {problem} ({file})"


def use_own_kernels(options: Any, *, panels: bool = False) -> None:
    """Lets the session that is opened with some options run embedge's kernels, if there are any.

    Args:
        options: of the session.
        panels: whether its weights lie in panels, see :func:`in_panels`.
    """
    library = kernel_library()
    if library is not None:
        _register(options, library, panels=panels)


def in_panels(weight: NDArray[np.int8]) -> NDArray[np.int8]:
    """A weight as the kernel expects it of a session whose weights lie in panels.

    Args:
        weight: int8 ``[depth, columns]``.

    Returns:
        int8 ``[depth, columns]``, the bytes of ``[columns / 16, depth / 4, 16, 4]``; as it was, where it
        does not fill its panels or has 4096 bytes at most.
    """
    depth, columns = weight.shape
    if weight.size <= INLINE_BYTES or depth % _GROUP or columns % _LANES:
        return weight
    lines = weight.reshape(depth // _GROUP, _GROUP, columns // _LANES, _LANES)
    # Mapped, so that the system has the memory back once ONNX Runtime has taken its copy: of what is
    # freed, the C library keeps blocks of this size for the next ones.
    panels = np.frombuffer(mmap.mmap(-1, weight.size), np.int8)
    panels.reshape(columns // _LANES, depth // _GROUP, _LANES, _GROUP)[:] = lines.transpose(
        2, 0, 3, 1
    )
    return panels.reshape(depth, columns)


def _register(options: Any, library: str, *, panels: bool) -> None:
    options.add_session_config_entry("embedge.weights", "panels" if panels else "rows")
    options.register_custom_ops_library(library)


def _is_right(library: str) -> bool:
    """Whether the kernels give the exact results of small matrices, products in both layouts."""
    draw = np.random.default_rng(5)
    for depth, columns in ((130, 50), (256, 64)):  # neither fills its panels; both do
        weight = draw.integers(-127, 128, (depth, columns), np.int8)
        for panels in (False, True):
            weights = {
                b"w": in_panels(weight) if panels else weight,
                b"a_scale": np.ones(1, np.float32),
                b"w_scale": np.full(columns, 0.5, np.float32),
                b"other": np.arange(columns, dtype=np.float32),
                b"zero": np.full(1, 128, np.uint8),
            }
            run = _opened(
                library, "MatMulIntegerToFloatAdd", (UINT8, depth), weights, columns, panels
            )
            for rows in (1, 21):
                a = draw.integers(0, 256, (rows, depth), np.uint8)
                products = (a.astype(np.int64) - 128) @ weight.astype(np.int64)
                if not np.array_equal(run(a), products * 0.5 + weights[b"other"]):
                    return False
    return _quantizers_are_right(library, draw.permutation(np.arange(-40, 42)))


def _quantizers_are_right(library: str, values: NDArray[Any]) -> bool:
    """Of whole numbers around zero, the largest above it by one."""
    x = values.astype(np.float32)[None]
    step = np.array(1 / x.max(), np.float32)
    weights: dict[bytes, NDArray[Any]] = {b"step": step, b"zero": np.full((1, 1), 128, np.uint8)}
    of_rows = _opened(library, "QuantizeRows", (FLOAT, x.size), weights, x.size, False, UINT8)
    scale = x.max() * step
    if not np.array_equal(of_rows(x), np.rint(x / scale) + 128):
        return False
    weights = {b"other": np.ones_like(x), b"step": step}
    half = x[:, : x.size // 2]
    of_halves = _opened(
        library, "QuantizeHalves", (FLOAT, x.size), weights, half.size, False, UINT8
    )
    scale = (half.max() - half.min()) * step
    return np.array_equal(of_halves(x), np.rint((half - half.min()) / scale))


def _opened(
    library: str,
    op_type: str,
    left: tuple[int, int],
    weights: Mapping[bytes, NDArray[Any]],
    columns: int,
    panels: bool,
    result: int = FLOAT,
) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """Runs one operator of the library on ``[rows, columns]``."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    _register(options, library, panels=panels)
    model = one_node_model(
        op_type.encode(),
        domain=b"embedge",
        inputs={b"a": left},
        weights=weights,
        output=(result, columns),
        outputs=_OUTPUTS.get(op_type, 1),
    )
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda a: np.asarray(session.run(None, {"a": a})[0])
