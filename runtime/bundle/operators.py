"""The operators that graphs of `embedge export` have, and the functions of its own that they call.

How often each takes and gives values, its attributes and their ranges: some that fit nothing end the process
in ONNX Runtime instead of being refused (:mod:`embedge.runtime.bundle.graph_check`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple, TypeAlias

from embedge.runtime.bundle.onnx_model import FLOAT, FLOAT16

__all__ = [
    "CONTRIB",
    "EMBEDGE",
    "FUNCTIONS",
    "OPERATORS",
    "OPSETS",
    "Branch",
    "Kind",
    "Operator",
    "Real",
    "Whole",
]

CONTRIB, EMBEDGE = "com.microsoft", "embedge"
OPSETS = {"": range(20, 25), CONTRIB: range(1, 2), EMBEDGE: range(1, 2)}  # versions, by domain
_MOST = (1 << 31) - 1


class Whole(NamedTuple):
    """A whole number within bounds, or a list of them."""

    least: int
    most: int
    many: bool = False

    @property
    def attribute_type(self) -> int:
        """Its ``AttributeProto.AttributeType``."""
        return 7 if self.many else 2


class Real(NamedTuple):
    """A finite number within bounds."""

    least: float
    most: float

    @property
    def attribute_type(self) -> int:
        """Its ``AttributeProto.AttributeType``."""
        return 1


class Branch(NamedTuple):
    """A graph without inputs."""

    @property
    def attribute_type(self) -> int:
        """Its ``AttributeProto.AttributeType``."""
        return 5


Kind: TypeAlias = Whole | Real | Branch
_AXIS, _LAST, _HEADS, _FLAG = Whole(-8, 8), Whole(-1, -1), Whole(1, 4096), Whole(0, 1)
_SIZE, _BLOCK, _NOTHING = Whole(1, _MOST), Whole(16, 4096), Whole(0, 0)
_SCALE, _EPSILON = Real(0, 1e6), Real(0, 1)


class Operator(NamedTuple):
    """How many inputs and outputs an operator may have, its attributes, and those it may not lack."""

    inputs: Collection[int]
    outputs: int
    attributes: Mapping[str, Kind]
    needed: Collection[str]


def _of(
    domain: str,
    names: str,
    *inputs: int,
    outputs: int = 1,
    needed: str = "",
    common: Mapping[str, Kind] | None = None,
    **attributes: Kind,
) -> dict[tuple[str, str], Operator]:
    """Operators that are alike; embedge's own functions need all of their attributes.

    Args:
        domain: of all.
        names: with spaces between.
        inputs: how many they may have.
        outputs: how many they have.
        needed: attributes that may not be left out, with spaces between.
        common: attributes that others have too.
        attributes: others.
    """
    known = {**(common or {}), **attributes}
    operator = Operator(inputs, outputs, known, known if domain == EMBEDGE else needed.split())
    return {(domain, name): operator for name in names.split()}


_ATTENTION: dict[str, Kind] = {"num_heads": _HEADS, "scale": _SCALE}
_GROUPED: dict[str, Kind] = {**_ATTENTION, "kv_num_heads": _HEADS}
_WINDOWED: dict[str, Kind] = {**_GROUPED, "local_window_size": Whole(-1, _MOST)}
_ROTARY: dict[str, Kind] = {"interleaved": _NOTHING, "num_heads": _HEADS}
_BLOCKS: dict[str, Kind] = {
    **{"K": _SIZE, "N": _SIZE, "accuracy_level": Whole(0, 4)},
    **{"bits": Whole(4, 4), "block_size": _BLOCK},
}

OPERATORS: Mapping[tuple[str, str], Operator] = {
    **_of("", "Abs Cos Identity Relu Round Sigmoid Sin Tanh", 1),
    **_of("", "Add And Div Equal Expand Greater GreaterOrEqual Less LessOrEqual MatMul Mul Sub", 2),
    **_of("", "Max Pad Reshape Squeeze Unsqueeze", 2),
    **_of("", "Range ScatterND Where", 3),
    **_of("", "Slice", 4),
    **_of("", "Attention", *range(3, 8), is_causal=_FLAG, q_num_heads=_HEADS, kv_num_heads=_HEADS,
          scale=_SCALE, softmax_precision=Whole(FLOAT, FLOAT)),
    **_of("", "Cast", 1, to=Whole(1, FLOAT16)),
    **_of("", "Concat", *range(1, 7), axis=_AXIS),
    **_of("", "Constant", 0, value_ints=Whole(-_MOST, _MOST, many=True)),
    **_of("", "Gather", 2, axis=_AXIS),
    **_of("", "GatherND", 2, batch_dims=Whole(0, 2)),
    **_of("", "If", 1, then_branch=Branch(), else_branch=Branch()),
    **_of("", "LayerNormalization", 2, 3, axis=_LAST, epsilon=_EPSILON),
    **_of("", "QuantizeLinear", 3, axis=_AXIS, block_size=_SIZE),
    **_of("", "RMSNormalization SimplifiedLayerNormalization", 2, axis=_LAST, epsilon=_EPSILON),
    **_of("", "ReduceL2 ReduceMax ReduceMin ReduceSum", 2, keepdims=_FLAG),
    **_of("", "RotaryEmbedding", 3, 4, common=_ROTARY),
    **_of("", "Shape", 1, start=_AXIS, end=_AXIS),
    **_of("", "Transpose", 1, perm=Whole(0, 8, many=True)),
    **_of(CONTRIB, "FastGelu Gelu", 1),
    **_of(CONTRIB, "GatherBlockQuantized", 4, needed="bits block_size quantize_axis", bits=Whole(4, 8),
          block_size=_BLOCK, gather_axis=_NOTHING, quantize_axis=Whole(1, 1)),
    **_of(CONTRIB, "GroupQueryAttention", 7, outputs=3, common=_WINDOWED),
    **_of(CONTRIB, "MatMulIntegerToFloat", 4, 5),
    **_of(CONTRIB, "MatMulNBits", 3, 4, needed="K N bits block_size", common=_BLOCKS),
    **_of(CONTRIB, "MultiHeadAttention", *range(3, 7), common=_ATTENTION),
    **_of(CONTRIB, "QuickGelu", 1, alpha=Real(-100, 100)),
    **_of(CONTRIB, "RotaryEmbedding", 4, common=_ROTARY),
}  # fmt: skip
FUNCTIONS: Mapping[tuple[str, str], Operator] = {
    **_of(EMBEDGE, "QuantizeRows", 3, outputs=2, width=_SIZE),
    **_of(EMBEDGE, "QuantizeRowsAbove", 4, outputs=2, width=_SIZE),
    **_of(EMBEDGE, "QuantizeRotated QuantizeRotatedSwiGLU", 6, outputs=2, width=_SIZE),
    **_of(EMBEDGE, "QuantizeRotatedAndProduct QuantizeRotatedSwiGLUAndProduct", 6, outputs=3, width=_SIZE),
    **_of(EMBEDGE, "MatMulIntegerToFloatAdd MatMulIntegerToFloatSub", 6),
    **_of(EMBEDGE, "BranchRows", 7, outputs=2, width=_SIZE),
    **_of(EMBEDGE, "MatMulIntegerToFloatBranch", 10),
    **_of(EMBEDGE, "MatMulIntegerToFloatBranchAdd MatMulIntegerToFloatBranchSub", 11),
    **_of(EMBEDGE, "MatMulNBitsBranch", 9, common=_BLOCKS),
    **_of(EMBEDGE, "CausalAttention", 5, common=_WINDOWED),
    **_of(EMBEDGE, "PaddedAttention", 4, common=_GROUPED),
    **_of(EMBEDGE, "FullAttention", 3, common=_ATTENTION),
}  # fmt: skip
