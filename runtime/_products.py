"""embedge's own kernel for 8-bit products, where it was built and the processor has what it needs.

``runtime/native/products.c`` takes the place of ONNX Runtime's kernel for ``MatMulIntegerToFloat`` in a
session: the same operator and the same result to the bit, faster most of all for short texts
(bench/LOG.md). It is compiled when embedge is installed and a C compiler is at hand; without it, on other
processors and where ``EMBEDGE_PRODUCTS=onnxruntime`` is set, sessions are ONNX Runtime's alone.

The kernel reads weights in panels of 16 columns, int8 ``[columns / 16, depth / 4, 16, 4]``. It makes them
itself from a bundle's ``[depth, columns]``, unless the session says that they lie in panels already:
:func:`in_panels`, for weights that are made when a session opens, and in prepared graphs.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import mmap
import os
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedge.runtime._cpu import has_amx
from embedge.runtime._errors import EmbedgeWarning
from embedge.runtime._onnx_model import FLOAT, UINT8, one_node_model

__all__ = ["PANELS", "in_panels", "own_products", "products_library", "use_own_products"]

PANELS = "panels of 16 x 4"  # the layout, as prepared graphs record it
_SWITCH, _OFF = "EMBEDGE_PRODUCTS", "onnxruntime"
_LANES, _GROUP = 16, 4  # columns of a panel, rows of a line
_SMALL_BYTES = 4096  # weights up to it lie in the graph, and never in panels


def own_products() -> bool:
    """Whether sessions on this processor multiply 8-bit integers with embedge's kernel."""
    return products_library() is not None


@functools.cache
def products_library() -> str | None:
    """The kernel's file, found and tried once per process; ``None``: ONNX Runtime's kernel is used.

    With AMX, ONNX Runtime multiplies whole tiles, which this kernel does not.
    """
    if os.environ.get(_SWITCH) == _OFF or has_amx():
        return None
    found = importlib.util.find_spec("embedge.runtime._products_kernel")
    if found is None or found.origin is None:
        return None
    try:
        if not ctypes.CDLL(found.origin).embedge_products_run_here():
            return None
        right = _is_right(found.origin)
    except Exception as error:  # ONNX Runtime's errors have no common base
        problem = " ".join(str(error).split())
    else:
        if right:
            return found.origin
        problem = "its products are wrong"
    warnings.warn(
        f"{found.origin}: not used: {problem}; ONNX Runtime's own kernel multiplies instead, slower; install "
        f"embedge again, or set {_SWITCH}={_OFF} to keep it out",
        EmbedgeWarning,
        stacklevel=2,
    )
    return None


def use_own_products(options: Any, *, panels: bool = False) -> None:
    """Lets the session that is opened with some options multiply with embedge's kernel, if there is one.

    Args:
        options: of the session.
        panels: whether its weights lie in panels, see :func:`in_panels`.
    """
    library = products_library()
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
    if weight.size <= _SMALL_BYTES or depth % _GROUP or columns % _LANES:
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
    """Whether the kernel gives the exact products of small matrices, in both layouts."""
    import onnxruntime

    draw = np.random.default_rng(5)
    for depth, columns in ((130, 50), (256, 64)):  # neither fills its panels; both do
        weight = draw.integers(-127, 128, (depth, columns), np.int8)
        for panels in (False, True):
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            options.log_severity_level = 4
            _register(options, library, panels=panels)
            model = one_node_model(
                b"MatMulIntegerToFloat",
                domain=b"com.microsoft",
                inputs={b"a": (UINT8, depth)},
                weights={
                    b"w": in_panels(weight) if panels else weight,
                    b"a_scale": np.ones(1, np.float32),
                    b"w_scale": np.full(columns, 0.5, np.float32),
                    b"zero": np.full(1, 128, np.uint8),
                },
                output=(FLOAT, columns),
            )
            session = onnxruntime.InferenceSession(
                model, options, providers=["CPUExecutionProvider"]
            )
            for rows in (1, 21):
                a = draw.integers(0, 256, (rows, depth), np.uint8)
                expected = (a.astype(np.int64) - 128) @ weight.astype(np.int64)
                (found,) = session.run(None, {"a": a})
                if not np.array_equal(found, expected * 0.5):
                    return False
    return True
