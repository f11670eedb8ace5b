"""The int4 weights run as int8: another graph over the same files, unpacked when it is opened.

It serves batches at int4 on processors whose 4-bit kernels embedge has not: ONNX Runtime's ``MatMulNBits``
multiplies 4-bit blocks at half the speed of 8-bit rows or less (lab note 31). So the runtime unpacks
the weights to 8 bits once (:mod:`embedge.runtime.sessions.unpack`). The graph is that of
:class:`Int8Scheme`, its inputs are smoothed and quantized per row; the weights are those that
:class:`Int4Scheme` stored, and the graph has their list beside it in place of their bytes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import TensorProto

from embedge.export.graph.initializers import (
    LazyInitializer,
    TensorSpec,
    UnpackedWeight,
    digest,
)
from embedge.export.graph.ops import OpBuilder
from embedge.export.graph.values import FloatArray, LinearGroup, LinearRef, Value
from embedge.export.schemes.int4 import Int4Scheme
from embedge.export.schemes.int8 import Int8Scheme, input_rotation, weight_specs
from embedge.export.schemes.smoothing_constants import SmoothingConstants
from embedge.export.weights.tensors import BASE
from embedge.runtime.bundle.contract import UNPACKED_PRECISION


class Int4UnpackedScheme(Int8Scheme):
    """See the module's description.

    Args:
        constants: of Linear inputs, as for :class:`Int8Scheme`.
        int4: the scheme whose weights are unpacked.
    """

    precision = UNPACKED_PRECISION

    def __init__(
        self, constants: Mapping[tuple[str, ...], SmoothingConstants], int4: Int4Scheme
    ) -> None:
        super().__init__(constants, table_bits=4)
        self.saturates = False  # embedge alone opens these graphs, and asks for exact products
        self._int4 = int4

    def _weight(self, g: OpBuilder, group: LinearGroup, linear: LinearRef) -> list[Value]:
        constants, name = self.constants_of(group), linear.label
        columns = constants.smooth
        stored = self._int4.norm_constants(group).smooth
        if stored is not None:  # the stored weight is smoothed already
            columns = ((1 if columns is None else columns) / stored).astype(np.float32)
        if columns is not None and constants.outliers is not None:
            columns = columns.copy()
            columns[constants.outliers] = 0  # multiplied in float32 beside it
        g.unpacked[name] = UnpackedWeight(
            specs=weight_specs(g, linear),
            out_features=linear.out_features(g.weights),
            in_features=linear.in_features(g.weights),
            packed=self._int4.weight(g, group, linear),
            block_size=self._int4.block_size,
            columns=_constant(f"{name}.columns", columns),
            rotation=_constant(f"{name}.rotation", input_rotation(g, group)),
            rows=_constant(f"{name}.rows", self._output_scale.get(name)),
        )
        return [Value(spec.name) for spec in g.unpacked[name].specs]


def _constant(name: str, value: FloatArray | None) -> LazyInitializer | None:
    if value is None:
        return None
    spec = TensorSpec(name=name, elem_type=TensorProto.FLOAT, shape=value.shape)
    return LazyInitializer(
        key=f"{name}|{digest(value)}", owner=BASE, specs=(spec,), compute=lambda: [value]
    )
