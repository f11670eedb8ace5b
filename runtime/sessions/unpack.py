"""4-bit weights unpacked to 8 bits when a graph opens: the disk of int4, the matmuls of int8.

The list of where the 4-bit blocks lie is read by :mod:`embedge.runtime.bundle.packed_weights`. They become
8 bits here, and are handed to ONNX Runtime as external initializers::

    w = (values - zero_points) · block_scales                  [out, in], blocks along in
    w = w · columns                                            smoothing; 0: multiplied elsewhere
    w = w · rotation                                           of each block along in, where there is one
    q = round(w / s),  s = max|w| / 127                        per row (output channel)
    weight = qᵀ,  scales = s · rows                            what was folded into the outputs

Rounding 4-bit blocks again, to 255 levels a row, adds about a hundredth of the noise they have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.bundle.onnx_model import ExternalData
from embedge.runtime.bundle.packed_weights import PackedWeight, Tensor
from embedge.runtime.errors import BundleError
from embedge.runtime.host.workers import Workers
from embedge.runtime.kernels.repack import in_panels

__all__ = ["Initializers", "initializers_of", "unpack"]

_QMAX = 127
_CHUNK_ELEMENTS = 1 << 17  # 512 KiB of float32 at a time, which a core's cache holds

Initializers: TypeAlias = dict[str, NDArray[Any]]
Resolve: TypeAlias = Callable[[ExternalData], Path]


def initializers_of(
    bundle: Bundle,
    precision: str,
    name: str,
    *,
    threads: int,
    panels: bool = False,
    scratch: Path | None = None,
) -> Initializers:
    """The initializers that a graph's file does not hold, made from 4-bit weights; often none.

    Args:
        bundle: whose graph.
        precision: the graph's.
        name: of a task, or ``VISION``.
        threads: cores to use.
        panels: as a session whose weights lie in panels takes them
            (:func:`embedge.runtime.kernels.repack.in_panels`), with the weights that are stored.
        scratch: a folder for panels, instead of memory.

    Raises:
        BundleError: if the weights cannot be read.
    """
    made: Initializers = {}
    packed = bundle.packed_weights(precision, name)
    if packed is not None:
        listed, weights = packed
        made = unpack(weights, partial(bundle.external_file, listed), threads=threads)
    if not panels:
        return made
    graph = bundle.graph(precision, name)
    for weight, stored in bundle.matmul_weights(precision, name).items():
        if weight not in made and stored.place is not None:
            file, offset = bundle.external_file(graph, stored.place), stored.place.offset
            made[weight] = np.memmap(file, stored.dtype, "r", offset, stored.shape)
        made[weight] = in_panels(made[weight], scratch)
    return made


def unpack(weights: Mapping[str, PackedWeight], resolve: Resolve, *, threads: int) -> Initializers:
    """int8 ``[in, out]`` and float32 ``[out]``, by initializer name.

    Args:
        weights: from :func:`embedge.runtime.bundle.packed_weights.read_packed`.
        resolve: the file of a tensor, checked to lie inside the bundle and to have its bytes.
        threads: cores to use.

    Raises:
        BundleError: if a weight is not finite.
    """
    result: Initializers = {}
    workers = Workers(threads)
    for name, weight in weights.items():  # one after the other: few rows are floats at a time
        matrix = np.empty((weight.in_features, weight.out_features), np.int8)
        scales = np.empty(weight.out_features, np.float32)
        stored = [_read(t, dtype, shape, resolve) for t, dtype, shape in weight.tensors]
        step = max(1, _CHUNK_ELEMENTS // max(weight.in_features, weight.block_size))
        starts = range(0, weight.out_features, step)
        work = partial(_unpack_rows, weight, stored, matrix, scales, step)
        for _ in workers.run(work, starts, most=2 * threads):
            pass
        if not np.isfinite(scales).all():
            raise BundleError(
                f"weight {name}: its 4-bit blocks hold values that are not finite; copy or export the "
                "bundle again"
            )
        result |= {f"{name}.weight": matrix, f"{name}.scales": scales}
    return result


@np.errstate(all="ignore")  # what is not finite is refused in the end
def _unpack_rows(
    weight: PackedWeight,
    stored: list[NDArray[Any]],
    matrix: NDArray[np.int8],
    scales: NDArray[np.float32],
    step: int,
    start: int,
) -> None:
    """Fills the columns of ``matrix`` and the scales that some rows of the weight make."""
    rows = slice(start, start + step)
    values, block_scales, zero_points, *others = stored
    packed = values[rows]
    count, blocks, _ = packed.shape
    levels = _nibbles(packed).reshape(count, blocks, weight.block_size)
    zeros = _nibbles(zero_points[rows])[:, :blocks]
    floats: NDArray[np.float32] = levels.astype(np.float32)
    floats -= zeros.astype(np.float32)[:, :, None]
    floats *= block_scales[rows][:, :, None]
    floats = floats.reshape(count, -1)[:, : weight.in_features]
    if weight.columns is not None:
        floats *= others.pop(0)
    if weight.rotation is not None:
        rotation: NDArray[np.float32] = others.pop(0)
        floats = (floats.reshape(-1, len(rotation)) @ rotation).reshape(floats.shape)
    scale = np.abs(floats).max(axis=1) / np.float32(_QMAX)
    scale[scale == 0] = 1  # what is not finite stays so
    floats /= scale[:, None]
    matrix[:, rows] = np.rint(floats, out=floats).astype(np.int8).T
    scales[rows] = scale if weight.rows is None else scale * others[-1][rows]


def _nibbles(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 ``[..., 2 · n]`` in 0…15 of ``[..., n]``, the low half of a byte first."""
    pairs = np.empty((*packed.shape, 2), np.uint8)
    np.bitwise_and(packed, 15, out=pairs[..., 0])
    np.right_shift(packed, 4, out=pairs[..., 1])
    return pairs.reshape(*packed.shape[:-1], -1)


def _read(tensor: Tensor, dtype: str, shape: tuple[int, ...], resolve: Resolve) -> NDArray[Any]:
    if isinstance(tensor, bytes):
        return np.frombuffer(tensor, dtype).reshape(shape)
    file = resolve(tensor)
    try:
        return np.memmap(file, dtype, "r", offset=tensor.offset, shape=shape)
    except (OSError, ValueError) as error:
        raise BundleError(
            f"{file}: cannot be read: {error}; copy or export the bundle again"
        ) from error
