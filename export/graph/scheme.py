"""How Linears and embedding tables are stored and run, one class per precision.

==========  =====================================================================================
fp32        ``MatMul`` with the transposed weight, ``Gather``
fp16        the same with float16 weights and products; everything between them stays float32
int8        smoothed, per-row quantized inputs and ``MatMulIntegerToFloat`` (``_int8_form.py``)
int4        ``MatMulNBits`` at accuracy level 4 (``_int4_form.py``)
int4-fp16   ``MatMulNBits`` on float16, for GPUs (``_int4_form.py``)
==========  =====================================================================================
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from embedge.export.errors import CheckpointError
from embedge.export.graph.builder import (
    CUDA_OPSET,
    OPSET,
    Graph,
    LazyInitializer,
    LinearGroup,
    LinearRef,
    TensorSpec,
)

FloatArray = NDArray[np.float32]
HALF_MAX = float(np.finfo(np.float16).max)  # 65504


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """A quantized Linear.

    Attributes:
        arrays: the stored tensors, in the order of the initializer's specs.
        sqnr_db: signal to noise of the weight in decibels.
        weight: float32 ``[out, in]``, what was quantized.
        lost: float32 ``[out, in]``, what of it was lost; ``None`` where nobody asked.
    """

    arrays: list[NDArray[Any]]
    sqnr_db: float
    weight: FloatArray
    lost: FloatArray | None


class Scheme:
    """Float32 storage and arithmetic; the base of the other schemes."""

    precision = "fp32"
    devices: tuple[str, ...] = ("cpu",)
    row_multiple = 1
    rotates = False  # whether residual streams are rotated first, where the family allows it
    fused_attention = False  # whether attention takes ONNX Runtime's own operators
    functions = False  # whether what embedge's kernels do stands in graphs as functions of its own
    cuda = False  # whether only operators and types are used that its CUDA provider implements
    opset = OPSET
    elem_type: int = TensorProto.FLOAT

    def linears(self, g: Graph, group: LinearGroup) -> list[str]:
        return self._products(g, group.value, group.lins)

    def scales_rows(self, group: LinearGroup) -> bool:
        """Whether :meth:`linears` takes a value whose rows are still to be scaled as it is."""
        return False

    def _products(self, g: Graph, x: str, lins: Sequence[LinearRef]) -> list[str]:
        return [g.op("MatMul", x, self.matrix(g, lin), name=lin.label) for lin in lins]

    def bias(
        self, g: Graph, lin: LinearRef, upstream_bias: LinearRef | None, negated: bool
    ) -> str | None:
        chain = [lin] if upstream_bias is None else [lin, upstream_bias]
        if not any(g.weights.has(bias_name(c)) or c.label in g.input_shift for c in chain):
            return None
        scale = g.output_scale.get(lin.label)
        constants = [g.input_shift.get(c.label) for c in chain]
        plain = upstream_bias is None and constants[0] is None and scale is None and not negated
        if plain and lin.start is None:
            return g.param(bias_name(lin))
        sources = [weight_name(c) for c in chain]
        sources += [bias_name(c) for c in chain if g.weights.has(bias_name(c))]

        def compute() -> FloatArray:
            constant = constants[0]
            if upstream_bias is not None:
                inner = full_bias(g, upstream_bias, constants[1])
                constant = inner if constant is None else constant + inner
            bias = full_bias(g, lin, constant)
            if scale is not None:
                bias = bias * scale
            return -bias if negated else bias

        return g.computed(
            f"{lin.label}.bias" + (".negated" if negated else ""),
            (out_features(g, lin),),
            compute,
            *sources,
            detail="|".join(digest(a) for a in (*constants, scale)),
        )

    def shifted_norm(self, g: Graph, x: str, bias: str) -> str | None:
        """``x + bias`` for free, where ``x`` is a norm that can be asked for again; else ``None``."""
        return None

    def embedding(self, g: Graph, name: str, ids: str) -> str:
        return g.op("Gather", g.param(name), ids, name=f"{name}/rows")

    def attention_operand(self, g: Graph, x: str) -> str:
        return x

    def attention_mask(self, g: Graph, mask: str) -> str:
        return mask

    def attention_result(self, g: Graph, x: str) -> str:
        return x

    def matrix(self, g: Graph, lin: LinearRef) -> str:
        """The transposed weight ``[in, out]`` as an initializer."""
        rows, columns = out_features(g, lin), in_features(g, lin)
        spec = TensorSpec(
            name=f"{lin.label}.weight", elem_type=self.elem_type, shape=(columns, rows)
        )

        def compute() -> list[NDArray[Any]]:
            weight = np.ascontiguousarray(read_linear(g, lin).T)
            half = self.elem_type == TensorProto.FLOAT16
            return [to_half(weight, weight_name(lin)) if half else weight]

        initializer = LazyInitializer(
            key=recipe_key(g, lin, self.precision),
            owner=g.owner(weight_name(lin)),
            specs=(spec,),
            compute=compute,
        )
        return g.initializer(initializer)[0]


class CudaScheme(Scheme):
    """What the precisions for GPUs share: float16 inside products and attention, float32 elsewhere.

    Norms, the softmax's sums, residuals, rotary positions and pooling stay float32.
    """

    devices = ("cuda",)
    fused_attention = True  # GroupQueryAttention has no float32 kernel there
    cuda = True
    opset = CUDA_OPSET

    def attention_operand(self, g: Graph, x: str) -> str:
        return g.op("Cast", x, to=TensorProto.FLOAT16)

    def attention_mask(self, g: Graph, mask: str) -> str:
        # -1e9 would become -inf, and a padded row that sees only padding NaN, which spreads
        return g.op("Cast", g.op("Max", mask, g.const(-3e4)), to=TensorProto.FLOAT16)

    def attention_result(self, g: Graph, x: str) -> str:
        return g.op("Cast", x, to=TensorProto.FLOAT)


class Float16Scheme(CudaScheme):
    """Float16 weights and products for GPUs.

    Args:
        rotates: whether the residual streams are rotated: of a vision tower whose language tower is.
    """

    precision = "fp16"
    elem_type = TensorProto.FLOAT16

    def __init__(self, *, rotates: bool = False) -> None:
        self.rotates = rotates

    def linears(self, g: Graph, group: LinearGroup) -> list[str]:
        half = g.op("Cast", group.value, to=TensorProto.FLOAT16)
        products = self._products(g, half, group.lins)
        return [g.op("Cast", y, to=TensorProto.FLOAT) for y in products]

    def embedding(self, g: Graph, name: str, ids: str) -> str:
        return half_rows(g, name, ids)


def half_rows(g: Graph, name: str, ids: str) -> str:
    """Rows of the table ``name`` for int64 ``ids``, stored as float16, looked up as float32."""
    spec = TensorSpec(name=name, elem_type=TensorProto.FLOAT16, shape=g.weights.shape(name))
    initializer = LazyInitializer(
        key=f"{name}@{g.weights.version(name)}|fp16",
        owner=g.owner(name),
        specs=(spec,),
        compute=lambda: [to_half(g.weights.read(name), name)],
    )
    return g.op("Cast", g.op("Gather", g.initializer(initializer)[0], ids), to=TensorProto.FLOAT)


def to_half(array: FloatArray, name: str) -> NDArray[np.float16]:
    """The float16 of a tensor.

    Raises:
        CheckpointError: for an element that float16 has no finite number for.
    """
    largest = float(max(array.max(initial=0), -array.min(initial=0)))
    with np.errstate(over="ignore"):
        if not np.isfinite(np.float16(largest)):
            raise CheckpointError(
                f"{name}: expected magnitudes of at most {HALF_MAX:.0f}, the largest of float16, found "
                f"{largest:.6g}; export at int8, int4 or fp32 instead"
            )
    return array.astype(np.float16)


# -- reading Linears --------------------------------------------------------------------------------


def weight_name(lin: LinearRef) -> str:
    """Canonical name of the weight tensor a Linear reads."""
    return f"{lin.name}.weight"


def bias_name(lin: LinearRef) -> str:
    """Canonical name of a Linear's bias tensor, which need not exist."""
    return f"{lin.name}.bias"


def out_features(g: Graph, lin: LinearRef) -> int:
    """Output channels of a Linear, or of its selected rows."""
    if lin.start is not None and lin.stop is not None:
        return lin.stop - lin.start
    return g.weights.shape(weight_name(lin))[0]


def in_features(g: Graph, lin: LinearRef) -> int:
    """Input channels of a Linear."""
    return g.weights.shape(weight_name(lin))[1]


def read_linear(g: Graph, lin: LinearRef) -> FloatArray:
    """A Linear's merged weight, float32 ``[out, in]``."""
    weight = g.weights.read(weight_name(lin))
    return weight if lin.start is None else weight[lin.start : lin.stop]


def read_bias(g: Graph, lin: LinearRef) -> FloatArray | None:
    """A Linear's merged bias, float32 ``[out]``, or ``None``."""
    if not g.weights.has(bias_name(lin)):
        return None
    bias = g.weights.read(bias_name(lin))
    return bias if lin.start is None else bias[lin.start : lin.stop]


def full_bias(g: Graph, lin: LinearRef, constant: FloatArray | None) -> FloatArray:
    """``bias + W·constant``: everything that does not depend on the token.

    Args:
        g: the graph whose weights are read.
        lin: the Linear.
        constant: float32 ``[in]``, the part of the input that its product left out, or ``None``.

    Returns:
        float32 ``[out]``.
    """
    bias = read_bias(g, lin)
    result = np.zeros(out_features(g, lin), np.float64) if bias is None else bias.astype(np.float64)
    if constant is not None:
        result = result + read_linear(g, lin).astype(np.float64) @ constant.astype(np.float64)
    return result.astype(np.float32)


def reported_db(value: float) -> float | None:
    """Decibels for the layer report; ``None`` where they are infinite, which JSON has not."""
    return round(value, 2) if np.isfinite(value) else None


def recipe_key(g: Graph, lin: LinearRef, detail: str) -> str:
    """Identity of a stored Linear: its tensor, the task it belongs to if adapted, and the format."""
    return f"{lin.label}@{g.weights.version(weight_name(lin))}|{detail}"


def digest(*arrays: NDArray[Any] | None) -> str:
    """A short identity of constants, for initializer keys."""
    state = hashlib.sha256()
    for array in arrays:
        state.update(b"-" if array is None else array.tobytes())
    return state.hexdigest()[:16]
