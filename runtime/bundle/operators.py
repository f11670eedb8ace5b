"""The operators that graphs of `embedge export` have, and the functions of its own that they call.

How often each takes and gives values, its attributes and their ranges: some that fit nothing end the process
in ONNX Runtime instead of being refused (:mod:`embedge.runtime.bundle.graph_check`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
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
_MOST_HEADS, _MOST_RANK = 4096, 8


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
_AXIS, _HEADS, _FLAG = Whole(-_MOST_RANK, _MOST_RANK), Whole(1, _MOST_HEADS), Whole(0, 1)
_SCALE, _EPSILON = Real(0, 1e6), Real(0, 1)
_WINDOW = Whole(-1, _MOST)
_WIDTH = Whole(1, _MOST)
_BLOCK = Whole(16, 4096)


@dataclass(frozen=True, kw_only=True)
class Operator:
    """How often an operator takes and gives values, and its attributes.

    Attributes:
        inputs: how many it may have.
        outputs: how many it may have.
        attributes: by name.
        needed: those of the attributes that may not be left out.
    """

    inputs: Collection[int]
    outputs: Collection[int] = (1,)
    attributes: Mapping[str, Kind] = field(default_factory=dict)
    needed: Collection[str] = ()


def _alike(names: str, *inputs: int, **attributes: Kind) -> dict[tuple[str, str], Operator]:
    return {("", n): Operator(inputs=inputs, attributes=attributes) for n in names.split()}


_GATED = {
    ("embedge", f"QuantizeRotated{gated}{product}"): Operator(
        inputs=(6,), outputs=(2 + bool(product),), attributes={"width": _WIDTH}
    )
    for gated in ("", "SwiGLU")
    for product in ("", "AndProduct")
}
OPERATORS: Mapping[tuple[str, str], Operator] = {
    **_alike("Abs Cos Identity Relu Sigmoid Sin Tanh", 1),
    **_alike("Add And Div Equal Expand Greater GreaterOrEqual Less LessOrEqual MatMul Mul Sub", 2),
    **_alike("Max Pad Reshape Squeeze Unsqueeze", 2),
    **_alike("Range ScatterND Where", 3),
    **_alike("Slice", 4),
    **_alike("Cast", 1, to=Whole(1, FLOAT16)),
    **_alike("Concat", 1, 2, 3, 4, axis=_AXIS),
    **_alike("Gather", 2, axis=_AXIS),
    **_alike("GatherND", 2, batch_dims=Whole(0, 2)),
    **_alike("ReduceL2 ReduceMax ReduceMin ReduceSum", 2, keepdims=_FLAG),
    **_alike("Transpose", 1, perm=Whole(0, _MOST_RANK, many=True)),
    ("", "Attention"): Operator(
        inputs=range(3, 8),
        attributes={
            "is_causal": _FLAG,
            "q_num_heads": _HEADS,
            "kv_num_heads": _HEADS,
            "scale": _SCALE,
            "softmax_precision": Whole(FLOAT, FLOAT),
        },
    ),
    ("", "Constant"): Operator(
        inputs=(0,), attributes={"value_ints": Whole(-_MOST, _MOST, many=True)}
    ),
    ("", "If"): Operator(
        inputs=(1,), attributes={"then_branch": Branch(), "else_branch": Branch()}
    ),
    ("", "LayerNormalization"): Operator(
        inputs=(2, 3), attributes={"axis": Whole(-1, -1), "epsilon": _EPSILON}
    ),
    **_alike(
        "RMSNormalization SimplifiedLayerNormalization", 2, axis=Whole(-1, -1), epsilon=_EPSILON
    ),
    ("", "QuantizeLinear"): Operator(
        inputs=(3,),
        attributes={"axis": _AXIS, "block_size": _WIDTH},
    ),
    ("", "RotaryEmbedding"): Operator(
        inputs=(3, 4), attributes={"interleaved": Whole(0, 0), "num_heads": _HEADS}
    ),
    ("", "Shape"): Operator(inputs=(1,), attributes={"start": _AXIS, "end": _AXIS}),
    (CONTRIB, "FastGelu"): Operator(inputs=(1,)),
    (CONTRIB, "Gelu"): Operator(inputs=(1,)),
    (CONTRIB, "QuickGelu"): Operator(inputs=(1,), attributes={"alpha": Real(-100, 100)}),
    (CONTRIB, "GatherBlockQuantized"): Operator(
        inputs=(4,),
        attributes={
            "bits": Whole(4, 8),
            "block_size": _BLOCK,
            "gather_axis": Whole(0, 0),
            "quantize_axis": Whole(1, 1),
        },
        needed=("bits", "block_size", "quantize_axis"),
    ),
    (CONTRIB, "GroupQueryAttention"): Operator(
        inputs=(7,),
        outputs=(3,),
        attributes={
            "num_heads": _HEADS,
            "kv_num_heads": _HEADS,
            "local_window_size": _WINDOW,
            "scale": _SCALE,
        },
    ),
    (CONTRIB, "MatMulIntegerToFloat"): Operator(inputs=(4, 5)),
    (CONTRIB, "MatMulNBits"): Operator(
        inputs=(3, 4),
        attributes={
            "K": _WIDTH,
            "N": _WIDTH,
            "accuracy_level": Whole(0, 4),
            "bits": Whole(4, 4),
            "block_size": _BLOCK,
        },
        needed=("K", "N", "bits", "block_size"),
    ),
    (CONTRIB, "MultiHeadAttention"): Operator(
        inputs=range(3, 7),
        attributes={"num_heads": _HEADS, "scale": _SCALE},
    ),
    (CONTRIB, "RotaryEmbedding"): Operator(
        inputs=(4,), attributes={"interleaved": Whole(0, 0), "num_heads": _HEADS}
    ),
}
FUNCTIONS: Mapping[tuple[str, str], Operator] = {
    **_GATED,
    (EMBEDGE, "QuantizeRows"): Operator(inputs=(3,), outputs=(2,), attributes={"width": _WIDTH}),
    (EMBEDGE, "QuantizeRowsAbove"): Operator(
        inputs=(4,), outputs=(2,), attributes={"width": _WIDTH}
    ),
    (EMBEDGE, "MatMulIntegerToFloatAdd"): Operator(inputs=(6,)),
    (EMBEDGE, "MatMulIntegerToFloatSub"): Operator(inputs=(6,)),
    (EMBEDGE, "CausalAttention"): Operator(
        inputs=(5,),
        attributes={
            "num_heads": _HEADS,
            "kv_num_heads": _HEADS,
            "local_window_size": _WINDOW,
            "scale": _SCALE,
        },
    ),
    (EMBEDGE, "PaddedAttention"): Operator(
        inputs=(4,), attributes={"num_heads": _HEADS, "kv_num_heads": _HEADS, "scale": _SCALE}
    ),
    (EMBEDGE, "FullAttention"): Operator(
        inputs=(3,), attributes={"num_heads": _HEADS, "scale": _SCALE}
    ),
}
