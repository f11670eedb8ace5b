"""int4 Linears: ``MatMulNBits`` with 4-bit blocks, a scale and a zero point each.

On the CPU the operator quantizes its input per row and block (accuracy level 4), so outliers stay in
their block; on GPUs (int4-fp16) it takes float16 inputs and scales.
Where calibration ran, the values come from GPTQ (``_calibration.py`` has stored them under the same
initializer key); this scheme's own ``compute`` is the data-free fallback with error-minimising grids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from embedge.export.graph.builder import (
    CONTRIB,
    Graph,
    LazyInitializer,
    LinearGroup,
    LinearRef,
    TensorSpec,
)
from embedge.export.graph.scheme import (
    CudaScheme,
    Rounded,
    Scheme,
    digest,
    in_features,
    out_features,
    read_linear,
    recipe_key,
    reported_db,
    to_half,
    weight_name,
)
from embedge.export.schemes.outlier_channels import beside, outliers
from embedge.quant import gptq, int4


class Int4Scheme(Scheme):
    """See the module's description.

    Args:
        block_size: input channels per block, a power of two ≥ 16.
        method: "gptq" or "rtn", part of the initializer keys.
        table_bits: bits of embedding tables.
        outliers: channels that are multiplied in float32, by the label of an input's first Linear.
    """

    precision = "int4"
    rotates = True
    fused_attention = True
    functions = True
    scale_type: int = TensorProto.FLOAT

    def __init__(
        self,
        block_size: int,
        method: str,
        table_bits: int,
        outliers: Mapping[str, NDArray[np.int64]] | None = None,
    ) -> None:
        self._outliers = outliers or {}
        self.block_size = block_size
        self.method = method
        self._table_bits = table_bits
        # Blocks above 32: ONNX Runtime's CPU kernel takes another path for an odd last row (measured: vectors
        # move by up to 6e-4), so the runtime keeps batch × tokens even.
        self.row_multiple = 1 if block_size <= 32 else 2

    def linears(self, g: Graph, group: LinearGroup) -> list[str]:
        products = [
            self._product(g, group.value, group, lin, accuracy_level=4) for lin in group.lins
        ]
        channels = self._outliers.get(group.label)
        if channels is None:
            return products
        return [
            beside(g, y, *outliers(g, group.value, lin, channels))
            for y, lin in zip(products, group.lins, strict=True)
        ]

    def _product(self, g: Graph, x: str, group: LinearGroup, lin: LinearRef, **options: int) -> str:
        return g.op(
            "MatMulNBits",
            x,
            *g.initializer(self.weight_recipe(g, group, lin)),
            domain=CONTRIB,
            name=lin.label,
            K=in_features(g, lin),
            N=out_features(g, lin),
            bits=4,
            block_size=self.block_size,
            **options,
        )

    def embedding(self, g: Graph, name: str, ids: str) -> str:
        from embedge.export.schemes.embedding_tables import quantized_rows

        return quantized_rows(g, name, ids, self._table_bits)

    # -- rounding -----------------------------------------------------------------------------------

    def smooth_hessian(self, g: Graph, group: LinearGroup, hessian: NDArray[np.float32]) -> None:
        """Take the outlier channels, which are not quantized, out of ``Σ x xᵀ``, in place."""
        channels = self._outliers.get(group.label)
        if channels is not None:
            hessian[channels] = 0
            hessian[:, channels] = 0

    def round(
        self,
        g: Graph,
        group: LinearGroup,
        lin: LinearRef,
        weight: NDArray[np.float32],
        hinv: NDArray[np.float32] | None = None,
    ) -> Rounded:
        """Quantize one of the Linears that share an input; see :meth:`Int8Scheme.round`."""
        channels = self._outliers.get(group.label)
        if channels is not None:
            weight[:, channels] = 0
        parts = int4.split_blocks(weight, self.block_size)
        if hinv is None:
            scales, zeros = int4.block_grid(parts)
            values = int4.quantize(parts, scales, zeros)
            lost = None
        else:
            values, scales, zeros = gptq.quantize_blocks(weight, hinv, self.block_size)
            restored = int4.dequantize(values, scales, zeros).reshape(len(weight), -1)
            lost = weight - restored[:, : weight.shape[1]]
        sqnr_db = int4.blocks_sqnr_db(parts, values, scales, zeros)
        arrays = pack(values, scales, zeros)
        if self.scale_type == TensorProto.FLOAT16:
            arrays[1] = to_half(scales, weight_name(lin))
        return Rounded(arrays=arrays, sqnr_db=sqnr_db, weight=weight, lost=lost)

    def restored(self, group: LinearGroup, weight: NDArray[np.float32]) -> NDArray[np.float32]:
        """What rounding to nearest leaves of a weight, outlier channels exact.

        Args:
            group: the Linear's input.
            weight: float32 ``[out, in]``, which is changed.

        Returns:
            float32 ``[in, out]``.
        """
        channels: Sequence[int] | NDArray[np.int64] = self._outliers.get(group.label, [])
        exact = weight[:, channels]
        weight[:, channels] = 0
        parts = int4.split_blocks(weight, self.block_size)
        scales, zeros = int4.block_grid(parts)
        values = int4.dequantize(int4.quantize(parts, scales, zeros), scales, zeros)
        result = values.reshape(len(weight), -1)[:, : weight.shape[1]]
        result[:, channels] = exact
        return np.ascontiguousarray(result.T)

    def weight_recipe(self, g: Graph, group: LinearGroup, lin: LinearRef) -> LazyInitializer:
        """Values, scales and zero points of a Linear; ``compute`` rounds to nearest."""
        rows, columns = out_features(g, lin), in_features(g, lin)
        blocks = -(-columns // self.block_size)

        noise: list[float] = []

        def compute() -> list[NDArray[Any]]:
            rounded = self.round(g, group, lin, read_linear(g, lin))
            noise[:] = [rounded.sqnr_db]
            return rounded.arrays

        def describe(arrays: Sequence[NDArray[Any]]) -> dict[str, Any]:
            facts: dict[str, Any] = {"format": f"int4 block {self.block_size} {self.method}"}
            if noise:  # GPTQ, which stores values of its own, states it itself
                facts["sqnr_db"] = reported_db(noise[0])
            return facts

        name = lin.label
        specs = (
            TensorSpec(
                name=f"{name}.weight",
                elem_type=TensorProto.UINT8,
                shape=(rows, blocks, self.block_size // 2),
            ),
            TensorSpec(name=f"{name}.scales", elem_type=self.scale_type, shape=(rows, blocks)),
            TensorSpec(
                name=f"{name}.zero_points",
                elem_type=TensorProto.UINT8,
                shape=(rows, -(-blocks // 2)),
            ),
        )
        outliers = digest(self._outliers.get(group.label))
        key = recipe_key(g, lin, f"{self.precision}|{self.block_size}|{self.method}|{outliers}")
        owner = g.owner(weight_name(lin))
        return LazyInitializer(
            key=key, owner=owner, specs=specs, compute=compute, describe=describe
        )


class Int4Float16Scheme(Int4Scheme, CudaScheme):
    """int4 for GPUs: the same values, float16 scales and inputs; see the module's description."""

    functions = False  # GPUs do not run the kernels
    precision = "int4-fp16"
    devices = CudaScheme.devices
    scale_type = TensorProto.FLOAT16

    def __init__(self, block_size: int, method: str, table_bits: int) -> None:
        super().__init__(block_size, method, table_bits)
        self.row_multiple = 1

    def linears(self, g: Graph, group: LinearGroup) -> list[str]:
        half = g.op("Cast", group.value, to=TensorProto.FLOAT16)
        products = [self._product(g, half, group, lin) for lin in group.lins]
        return [g.op("Cast", y, to=TensorProto.FLOAT) for y in products]

    def embedding(self, g: Graph, name: str, ids: str) -> str:
        from embedge.export.schemes.embedding_tables import quantized_rows

        return quantized_rows(g, name, ids, self._table_bits, half=True)


def pack(
    values: NDArray[np.uint8], scales: NDArray[np.float32], zeros: NDArray[np.uint8]
) -> list[NDArray[Any]]:
    """uint8 ``[out, blocks, block_size]``, float32 and uint8 ``[out, blocks]`` as stored tensors."""
    return [int4.pack_pairs(values), scales, int4.pack_pairs(zeros)]
