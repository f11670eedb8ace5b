"""Which precisions there are, what an export at one takes, and the scheme that writes its graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from embedge.export.graph.scheme import BranchRanks, Scheme
from embedge.export.schemes.floats import Float16Scheme, Float32Scheme
from embedge.export.schemes.int4 import Int4Float16Scheme, Int4Scheme
from embedge.export.schemes.int4_unpacked import Int4UnpackedScheme
from embedge.export.schemes.int8 import Int8Scheme
from embedge.export.schemes.mixed import MixedScheme, first_match
from embedge.export.schemes.smoothing_constants import SmoothingConstants
from embedge.runtime.bundle.contract import UNPACKED_PRECISION

Constants = Mapping[tuple[str, ...], SmoothingConstants]


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What an export at a precision takes.

    Attributes:
        method: which method rounds its weights, that of "int8" or that of "int4"; ``None``: they are floats.
        smoothed: whether it has constants of Linear inputs, which calibration finds.
        beside: precisions that run the same files in another way; they are written with it.
        tower: the vision tower's precision where it is another, as images lose more by 4 bits than texts.
        half: whether its matmuls are of float16 values.
    """

    method: str | None = None
    smoothed: bool = False
    beside: tuple[str, ...] = ()
    tower: str | None = None
    half: bool = False


PRECISIONS = {
    "fp32": Precision(),
    "fp16": Precision(half=True),
    "int8": Precision(method="int8", smoothed=True),
    "int4": Precision(method="int4", smoothed=True, beside=(UNPACKED_PRECISION,), tower="int8"),
    "int4-fp16": Precision(method="int4", tower="fp16", half=True),
}
BRANCHED = ("int8", "int4")  # precisions whose Linears can have a branch
PORTABLE = ("int8", "int4")  # precisions whose 8-bit weights an export can make portable
KEPT = ("fp32", "int8")  # precisions that some layers of an int8 or int4 export may have


def make_scheme(
    precision: str,
    *,
    constants: Constants,
    int4_block_size: int,
    methods: Mapping[str, str],
    keep: Mapping[str, str],
    portable: bool = False,
    branch_ranks: BranchRanks = BranchRanks(),  # noqa: B008 - it cannot be changed
    sweeps: int = 0,
) -> Scheme:
    """The scheme of a precision, where layers are kept at others a mixture.

    Args:
        precision: its name.
        constants: of int8 inputs, by the labels of the Linears that read one; empty without calibration.
        int4_block_size: input channels that share a scale.
        methods: how weights are rounded, "gptq" or "rtn", for "int8" and "int4".
        keep: precisions by pattern.
        portable: whether 8-bit weights fit products of 16 bits.
        branch_ranks: columns of the branches of inputs.
        sweeps: of coordinate descent behind GPTQ.
    """
    if precision == "fp32":
        return Float32Scheme()
    if precision == "fp16":
        return Float16Scheme()
    outliers = {labels: of.outliers for labels, of in constants.items() if of.outliers is not None}
    norms = {
        labels: SmoothingConstants(shift=of.shift, smooth=of.int4_smooth)
        for labels, of in constants.items()
        if of.shift is not None
    }
    settings: dict[str, Any] = {"branch_ranks": branch_ranks, "sweeps": sweeps}
    int4 = Int4Scheme(int4_block_size, methods["int4"], 4, outliers, norms, **settings)

    def make(name: str) -> Scheme:
        own = _that_hold(constants, name, precision, keep)
        schemes: dict[str, Scheme] = {
            "fp32": Float32Scheme(),
            "int8": Int8Scheme(own, methods["int8"], portable=portable, **settings),
            "int4": int4,
            UNPACKED_PRECISION: Int4UnpackedScheme(own, int4),
            "int4-fp16": Int4Float16Scheme(int4_block_size, methods["int4"], 4, sweeps),
        }
        return schemes[name]

    made = {name: make(name) for name in {precision, *keep.values()}}
    if set(made) == {precision}:
        return made[precision]
    return MixedScheme(made[precision], {pattern: made[name] for pattern, name in keep.items()})


def _that_hold(
    constants: Constants, wanted: str, precision: str, keep: Mapping[str, str]
) -> Constants:
    """The constants of the inputs that a precision of a mixture reads.

    A producer at another precision takes no scale into its weight, so its consumer is left as it is.

    Args:
        constants: of all inputs.
        wanted: the precision.
        precision: that of the mixture.
        keep: precisions by pattern.
    """

    def at_wanted(labels: tuple[str, ...]) -> bool:
        pattern = first_match(keep, *labels)
        return (precision if pattern is None else keep[pattern]) == wanted

    groups = {label: labels for labels in constants for label in labels}
    return {
        labels: of
        for labels, of in constants.items()
        if at_wanted(labels) and (of.sink is None or at_wanted(groups[of.sink.linear.label]))
    }


__all__ = ["BRANCHED", "KEPT", "PORTABLE", "PRECISIONS", "make_scheme"]
