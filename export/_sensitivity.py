"""Which layers of an int4 export are worth 8 bits, under a budget of bytes.

Every Linear input is asked what its Linears would lose at 4 and at 8 bits: the error of their outputs
on calibration tokens, relative to the outputs. The inputs with the largest loss per byte get 8 bits,
until the budget is used up. The choice depends on the backbone alone, so that tasks share tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embedge.export._calibration import TokenBatch, calibrate
from embedge.export._forms import Form, read_linear
from embedge.export._graph import Graph, Lin, Weights
from embedge.export._int4_form import Int4Form
from embedge.export._int8_form import Int8Form
from embedge.export.families import Family
from embedge.quant import _int4, _int8
from embedge.runtime._errors import EmbedgeValueError

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """The Linears of one input.

    Attributes:
        labels: of the Linears.
        gain: squared relative output error that 8 bits would take away.
        extra_bytes: what 8 bits take more than 4.
    """

    labels: tuple[str, ...]
    gain: float
    extra_bytes: int


def candidates(
    family: Family,
    base: Weights,
    batches: Sequence[TokenBatch],
    block_size: int,
    scratch: Path,
    report: Callable[[str], None],
) -> list[Candidate]:
    """What 8 bits would gain at every Linear input of the backbone.

    Args:
        family: the model.
        base: the backbone's tensors, rotated if the export's are.
        batches: calibration tokens.
        block_size: of the 4-bit form.
        scratch: folder for a layer's weights.
        report: takes progress lines.
    """
    found = []
    g = Graph(weights=base, form=Form())
    four, eight = Int4Form(block_size, "rtn", 4), Int8Form({})
    passes = calibrate(family, base, batches, scratch=scratch, wants_sample=lambda tap: True)
    for index, statistics in passes:
        report(f"measuring sensitivity, layer {index + 1} of {family.num_layers}")
        for value in statistics.values():
            tap, lins = value.tap, value.tap.lins
            inputs = np.concatenate(value.sample)
            extra = sum(
                spec.nbytes * sign
                for form, sign in ((eight, 1), (four, -1))
                for lin in lins
                for spec in form.weight_recipe(g, tap, lin).specs
            )
            gain = sum(_gain(g, lin, inputs, block_size) for lin in lins)
            labels = tuple(lin.label for lin in lins)
            found.append(Candidate(labels=labels, gain=gain, extra_bytes=extra))
    return found


def within_budget(found: Sequence[Candidate], smallest: int, budget: int) -> list[str]:
    """Labels of the Linears that get 8 bits: the largest gains per byte that fit.

    Args:
        found: from :func:`candidates`.
        smallest: bytes of a task's tensors with 4 bits everywhere.
        budget: most bytes of a task's tensors.

    Raises:
        EmbedgeValueError: the budget is below ``smallest``.
    """
    if budget < smallest:
        raise EmbedgeValueError(
            f"budget {budget:,} bytes: a task at int4 takes {smallest:,}; give at least that, or a larger "
            "int4_block_size (--int4-block-size)"
        )
    chosen: list[str] = []
    left = budget - smallest
    for candidate in sorted(found, key=lambda c: (-c.gain / max(1, c.extra_bytes), c.labels)):
        if candidate.extra_bytes <= left:
            left -= candidate.extra_bytes
            chosen += candidate.labels
    return chosen


def _gain(g: Graph, lin: Lin, inputs: FloatArray, block_size: int) -> float:
    weight = read_linear(g, lin)
    power = float(np.square(inputs @ weight.T).sum(dtype=np.float64))
    if power == 0:
        return 0.0
    parts = _int4.split_blocks(weight, block_size)
    scales, zeros = _int4.block_grid(parts)
    restored = _int4.dequantize(_int4.quantize(parts, scales, zeros), scales, zeros)
    lost = restored.reshape(len(weight), -1)[:, : weight.shape[1]] - weight
    at_four = float(np.square(inputs @ lost.T).sum(dtype=np.float64))
    rows = _int8.quantize_rows(weight)
    lost = rows.values * rows.scales[:, None] - weight
    at_eight = float(np.square(inputs @ lost.T).sum(dtype=np.float64))
    return max(0.0, at_four - at_eight) / power
