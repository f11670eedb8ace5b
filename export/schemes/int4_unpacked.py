"""The int4 weights run as int8: another graph over the same files, unpacked when it is opened.

ONNX Runtime's ``MatMulNBits`` multiplies 4-bit blocks at half the speed of 8-bit rows or less, so a batch is
faster where the weights are unpacked to 8 bits once (:mod:`embedge.runtime.sessions.unpack`). The graph is that of
:class:`Int8Scheme`, its inputs are smoothed and quantized per row; the weights are those that
:class:`Int4Scheme` stored, and the graph has their list beside it in place of their bytes.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from embedge.export.graph.builder import Graph, LazyInitializer, LinearGroup, LinearRef, TensorSpec
from embedge.export.graph.scheme import digest, in_features, out_features
from embedge.export.schemes.int4 import Int4Scheme
from embedge.export.schemes.int8 import Int8Scheme, SmoothingConstants, input_rotation, weight_specs
from embedge.export.weights.tensors import BASE
from embedge.export.writing.weight_store import TensorStore
from embedge.runtime.bundle.contract import UNPACKED_PRECISION


@dataclass(frozen=True, kw_only=True)
class Unpacked:
    """A Linear's weight that a graph's file does not hold.

    Attributes:
        specs: the initializers that unpacking makes, those of :class:`Int8Scheme`.
        out_features: rows.
        in_features: columns.
        packed: the stored 4-bit tensors.
        block_size: columns that share a scale.
        columns: float32 ``[in]`` factors of the columns, or ``None``.
        rotation: float32 ``[n, n]`` by which each block of a row is multiplied then, or ``None``.
        rows: float32 ``[out]`` factors of the scales, or ``None``.
    """

    specs: tuple[TensorSpec, ...]
    out_features: int
    in_features: int
    packed: LazyInitializer
    block_size: int
    columns: LazyInitializer | None
    rotation: LazyInitializer | None
    rows: LazyInitializer | None

    @property
    def initializers(self) -> list[LazyInitializer]:
        """What has to be stored."""
        return [r for r in (self.packed, self.columns, self.rotation, self.rows) if r is not None]


class Int4UnpackedScheme(Int8Scheme):
    """See the module's description.

    Args:
        plans: constants by the label of an input's first Linear; empty without calibration.
        int4: the scheme whose weights are unpacked.
    """

    precision = UNPACKED_PRECISION

    def __init__(self, plans: Mapping[str, SmoothingConstants], int4: Int4Scheme) -> None:
        super().__init__(plans, table_bits=4)
        self._int4 = int4

    def _weight(self, g: Graph, group: LinearGroup, lin: LinearRef) -> list[str]:
        plan = self._plan(g, group)
        columns = plan.smooth
        if columns is not None and plan.outliers is not None:
            columns = columns.copy()
            columns[plan.outliers] = 0  # multiplied in float32 beside it
        scale = self._output_scale.get(lin.label)
        unpacked = Unpacked(
            specs=weight_specs(g, lin),
            out_features=out_features(g, lin),
            in_features=in_features(g, lin),
            packed=self._int4.weight_recipe(g, group, lin),
            block_size=self._int4.block_size,
            columns=_constant(f"{lin.label}.columns", columns),
            rotation=_constant(f"{lin.label}.rotation", input_rotation(g, group)),
            rows=_constant(f"{lin.label}.rows", scale),
        )
        g.unpacked[lin.label] = unpacked
        return [spec.name for spec in unpacked.specs]


def unpack_list(g: Graph, store: TensorStore) -> dict[str, Any]:
    """The list that :func:`embedge.runtime.bundle.packed_weights.read_packed` reads.

    Args:
        g: a pruned graph of :class:`Int4UnpackedScheme`.
        store: holds the initializers of its weights.
    """
    weights = {}
    for label, unpacked in g.unpacked.items():
        values, scales, zeros = _places(store, unpacked.packed)
        columns, rotation, rows = (
            None if initializer is None else _places(store, initializer)[0]
            for initializer in (unpacked.columns, unpacked.rotation, unpacked.rows)
        )
        weights[label] = {
            "out_features": unpacked.out_features,
            "in_features": unpacked.in_features,
            "block_size": unpacked.block_size,
            "packed": values,
            "block_scales": scales,
            "zero_points": zeros,
            "columns": columns,
            "rotation": rotation,
            "rows": rows,
        }
    return {"weights": weights}


def _constant(name: str, value: NDArray[np.float32] | None) -> LazyInitializer | None:
    if value is None:
        return None
    spec = TensorSpec(name=name, elem_type=TensorProto.FLOAT, shape=value.shape)
    return LazyInitializer(
        key=f"{name}|{digest(value)}", owner=BASE, specs=(spec,), compute=lambda: [value]
    )


def _places(store: TensorStore, initializer: LazyInitializer) -> list[dict[str, Any]]:
    """Where each tensor of a stored initializer lies."""
    result: list[dict[str, Any]] = []
    for tensor in store.tensors(initializer):
        entry = {e.key: e.value for e in tensor.external_data}
        if entry:
            numbers = {key: int(entry[key]) for key in ("offset", "length")}
            result.append({"location": entry["location"], **numbers})
        else:
            result.append({"base64": base64.b64encode(tensor.raw_data).decode()})
    return result
