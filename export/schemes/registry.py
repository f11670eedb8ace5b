"""From a precision's name to the scheme that writes its graphs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from embedge.export.graph.builder import LinearGroup
from embedge.export.graph.scheme import Float16Scheme, Scheme
from embedge.export.schemes.int4 import Int4Float16Scheme, Int4Scheme
from embedge.export.schemes.int4_unpacked import Int4UnpackedScheme
from embedge.export.schemes.int8 import Int8Scheme, SmoothingConstants
from embedge.export.schemes.mixed import MixedScheme
from embedge.runtime.bundle.contract import UNPACKED_PRECISION

__all__ = ["gptq_scheme", "make_scheme"]


def make_scheme(
    precision: str,
    *,
    constants: Mapping[str, SmoothingConstants],
    int4_block_size: int,
    methods: Mapping[str, str],
    keep: Mapping[str, str],
) -> Scheme:
    """The scheme of a precision, wrapped where layers are kept at another one.

    Args:
        precision: its name.
        constants: those of int8 inputs, by the label of their first Linear.
        int4_block_size: input channels that share a scale.
        methods: how weights are rounded, "gptq" or "rtn", for "int8" and "int4".
        keep: precisions by pattern.
    """
    int8 = Int8Scheme(constants, methods["int8"])
    outliers = {label: c.outliers for label, c in constants.items() if c.outliers is not None}
    int4 = Int4Scheme(int4_block_size, methods["int4"], 4, outliers)
    unpacked = Int4UnpackedScheme(constants, int4)
    schemes: dict[str, Scheme] = {
        "fp32": Scheme(),
        "fp16": Float16Scheme(),
        "int8": int8,
        "int4": int4,
        UNPACKED_PRECISION: unpacked,
        "int4-fp16": Int4Float16Scheme(int4_block_size, methods["int4"], 4),
    }
    scheme = schemes[precision]
    if not keep or precision in ("fp32", "fp16"):
        return scheme
    if set(keep.values()) == {precision}:
        return scheme
    mixed = MixedScheme(scheme, {pattern: schemes[p] for pattern, p in keep.items()})
    for eight in (int8, unpacked):
        eight.keep_plans(partial(_runs, mixed, eight))
    return mixed


def gptq_scheme(scheme: Scheme, group: LinearGroup) -> Int8Scheme | Int4Scheme | None:
    """The scheme that rounds the Linears of an input by GPTQ, ``None`` where none does."""
    if isinstance(scheme, MixedScheme):
        scheme = scheme.form_of(*(lin.label for lin in group.lins))
    if isinstance(scheme, (Int8Scheme, Int4Scheme)) and scheme.method == "gptq":
        return scheme
    return None


def _runs(mixed: MixedScheme, scheme: Scheme, label: str) -> bool:
    """Whether ``scheme`` is the one of a Linear."""
    return mixed.form_of(label) is scheme
