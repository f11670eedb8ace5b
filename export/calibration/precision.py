"""From a precision's name to the scheme that writes its graphs, with the calibration it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embedge.export.calibration.layers import InputStatistics, TokenBatch, calibrate
from embedge.export.calibration.smoothing import input_plan, rotated_plan
from embedge.export.errors import CheckpointError
from embedge.export.families import Family
from embedge.export.graph.builder import Graph, LinearGroup, LinearRef
from embedge.export.graph.scheme import Float16Scheme, Rounded, Scheme, reported_db, weight_name
from embedge.export.schemes.int4 import Int4Float16Scheme, Int4Scheme
from embedge.export.schemes.int4_unpacked import Int4UnpackedScheme
from embedge.export.schemes.int8 import Int8Scheme, SmoothingConstants
from embedge.export.schemes.mixed import MixedScheme
from embedge.export.weights.rotated import RotatedWeights
from embedge.export.weights.tensors import Weights
from embedge.export.writing.weight_store import TensorStore
from embedge.quant import gptq
from embedge.runtime.bundle.contract import UNPACKED_PRECISION

SMOOTHING_ALPHA = 0.7  # measured on MiniLM: 0.4 … 0.7 differ little, 0.7 is best
BATCH_TOKENS = 1024
STATE_BYTES = 96 * 1024 * 1024  # of calibration states held between layers
MAX_TOKENS_PER_TEXT = 256
_ERROR_ROWS = 512

Report = Callable[[str], None]


def token_batches(ids: Sequence[Sequence[int]], pad: int, hidden_size: int) -> list[TokenBatch]:
    """Length-sorted, right-padded batches; texts beyond the memory for states are left out.

    Args:
        ids: token ids of every calibration text.
        pad: id that fills rows.
        hidden_size: width of a token's state, float32.
    """
    budget = STATE_BYTES // (4 * hidden_size)
    kept: list[Sequence[int]] = []
    for text in ids:
        if not text:
            continue
        if sum(map(len, kept)) + len(text) > budget and kept:
            break
        kept.append(text[:MAX_TOKENS_PER_TEXT])
    batches: list[list[Sequence[int]]] = []
    for text in sorted(kept, key=len):
        if not batches or (len(batches[-1]) + 1) * len(text) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(text)
    result = []
    for batch in batches:
        width = max(map(len, batch))
        tokens = np.full((len(batch), width), pad, np.int64)
        mask = np.zeros((len(batch), width), np.int64)
        for row, text in enumerate(batch):
            tokens[row, : len(text)] = text
            mask[row, : len(text)] = 1
        result.append(TokenBatch(ids=tokens, mask=mask))
    return result


def int8_plans(
    family: Family, base: Weights, batches: Sequence[TokenBatch], scratch: Path, report: Report
) -> dict[str, SmoothingConstants]:
    """Shift and smoothing of every Linear input, from the backbone without an adapter.

    They are the same for all tasks, so that what adapters leave alone stays one tensor for all.
    """
    plans: dict[str, SmoothingConstants] = {}
    if not batches:
        return plans
    rotated = isinstance(base, RotatedWeights)
    passes = calibrate(
        family,
        base,
        batches,
        scratch=scratch,
        wants_sample=lambda group: rotated and group.gated,
    )
    for index, statistics in passes:
        report(f"calibrating int8 on the backbone, layer {index + 1} of {family.num_layers}")
        for label, value in statistics.items():
            plans[label] = rotated_plan(value) if rotated else input_plan(value, SMOOTHING_ALPHA)
    return plans


def make_form(
    precision: str,
    *,
    plans: Mapping[str, SmoothingConstants],
    int4_block_size: int,
    methods: Mapping[str, str],
    keep: Mapping[str, str],
) -> Scheme:
    """The scheme of a precision, wrapped where layers are kept at another one.

    Args:
        precision: its name.
        plans: constants of int8 inputs.
        int4_block_size: input channels that share a scale.
        methods: how weights are rounded, "gptq" or "rtn", for "int8" and "int4".
        keep: precisions by pattern.
    """
    int8 = Int8Scheme(plans, methods["int8"])
    loud = {label: p.outliers for label, p in plans.items() if p.outliers is not None}
    int4 = Int4Scheme(int4_block_size, methods["int4"], 4, loud)
    unpacked = Int4UnpackedScheme(plans, int4)
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


def _runs(mixed: MixedScheme, scheme: Scheme, label: str) -> bool:
    """Whether ``scheme`` is the one of a Linear."""
    return mixed.form_of(label) is scheme


def gptq_form_of(scheme: Scheme, group: LinearGroup) -> Int8Scheme | Int4Scheme | None:
    """The scheme that rounds the Linears of an input by GPTQ, ``None`` where none does."""
    if isinstance(scheme, MixedScheme):
        scheme = scheme.form_of(*(lin.label for lin in group.lins))
    if isinstance(scheme, (Int8Scheme, Int4Scheme)) and scheme.method == "gptq":
        return scheme
    return None


def store_gptq(
    family: Family,
    weights: Weights,
    scheme: Scheme,
    g: Graph,
    batches: Sequence[TokenBatch],
    store: TensorStore,
    *,
    task: str,
    wanted: Callable[[str], bool],
    file: str,
    report: Report,
) -> None:
    """Quantize Linears by GPTQ, layer by layer, straight into the store.

    Args:
        family: the model.
        weights: the tensors to run: a task's, or the backbone's.
        scheme: the precision's scheme.
        g: a task's graph in that scheme, whose initializers are stored.
        batches: calibration tokens.
        store: takes the results.
        task: for the progress line.
        wanted: whether the weight of this canonical name is to be quantized in this pass.
        file: the weight file for new tensors.
        report: takes progress lines.
    """

    def jobs(group: LinearGroup) -> list[LinearRef]:
        rounding = gptq_form_of(scheme, group)
        if rounding is None:
            return []
        return [
            lin
            for lin in group.lins
            if wanted(weight_name(lin)) and not store.has(rounding.weight_recipe(g, group, lin).key)
        ]

    passes = calibrate(
        family,
        weights,
        batches,
        scratch=store.folder,
        wants_hessian=lambda group: bool(jobs(group)),
    )
    for index, statistics in passes:
        report(f"{task}: GPTQ, layer {index + 1} of {family.num_layers}")
        for value in statistics.values():
            value.matrices.clear()
            rounding = gptq_form_of(scheme, value.group)
            if rounding is not None and value.hessian is not None:
                _quantize_group(g, rounding, value, jobs(value.group), store, file)


def _quantize_group(
    g: Graph,
    scheme: Int8Scheme | Int4Scheme,
    value: InputStatistics,
    lins: Sequence[LinearRef],
    store: TensorStore,
    file: str,
) -> None:
    """Quantize the Linears that share an input, with its Hessian."""
    hessian = value.hessian
    if not lins or hessian is None:
        return
    scheme.smooth_hessian(g, value.group, hessian)
    try:
        upper = gptq.inverse_factor(hessian)  # also damps the Hessian's diagonal a little
    except ArithmeticError as problem:
        raise CheckpointError(f"{lins[0].label}: GPTQ is not possible here: {problem}") from problem
    for lin in lins:
        rounded = scheme.round(g, value.group, lin, upper)
        if lin is lins[-1]:
            del upper
        facts = {
            "sqnr_db": reported_db(rounded.sqnr_db),
            "output_error": _output_error(rounded, hessian),
        }
        store.put(scheme.weight_recipe(g, value.group, lin), rounded.arrays, file, facts)
        del rounded  # what follows reads a weight again
    value.hessian = None


def _output_error(rounded: Rounded, hessian: NDArray[np.float32]) -> float:
    """``‖(W - W_q)·X‖ / ‖W·X‖`` over the calibration tokens."""
    assert rounded.lost is not None
    noise = signal = 0.0
    for start in range(0, len(rounded.weight), _ERROR_ROWS):  # bounds the memory of the products
        rows = slice(start, start + _ERROR_ROWS)
        noise += float(np.einsum("ij,ij->", rounded.lost[rows] @ hessian, rounded.lost[rows]))
        signal += float(np.einsum("ij,ij->", rounded.weight[rows] @ hessian, rounded.weight[rows]))
    return round(float(np.sqrt(max(noise, 0.0) / signal)), 6) if signal > 0 else 0.0


__all__ = ["gptq_form_of", "int8_plans", "make_form", "store_gptq", "token_batches"]
