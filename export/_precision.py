"""From a precision's name to the form that writes its graphs, with the calibration it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embedge.export._calibration import InputStatistics, TokenBatch, calibrate
from embedge.export._errors import CheckpointError
from embedge.export._forms import (
    Form,
    HalfForm,
    in_features,
    out_features,
    read_linear,
    reported_db,
    weight_name,
)
from embedge.export._graph import Graph, Lin, Tap
from embedge.export._int4_form import Int4Form, pack
from embedge.export._int8_form import InputPlan, Int8Form
from embedge.export._mixed_form import MixedForm
from embedge.export._plans import input_plan
from embedge.export._store import TensorStore
from embedge.export._weights import TaskWeights
from embedge.export.families import Family
from embedge.quant import _gptq, _int4

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
    family: Family, base: TaskWeights, batches: Sequence[TokenBatch], scratch: Path, report: Report
) -> dict[str, InputPlan]:
    """Shift and smoothing of every Linear input, from the backbone without an adapter.

    They are the same for all tasks, so that what adapters leave alone stays one tensor for all.
    """
    plans: dict[str, InputPlan] = {}
    if not batches:
        return plans
    for index, statistics in calibrate(family, base, batches, scratch=scratch):
        report(f"calibrating int8 on the backbone, layer {index + 1} of {family.num_layers}")
        for label, value in statistics.items():
            plans[label] = input_plan(value, SMOOTHING_ALPHA)
    return plans


def make_form(
    precision: str,
    *,
    plans: Mapping[str, InputPlan],
    int4_block_size: int,
    calibrated: bool,
    keep: Mapping[str, str],
) -> Form:
    """The form of a precision, wrapped where layers are kept at another one."""
    int8 = Int8Form(plans)
    method = "gptq" if calibrated else "rtn"
    forms: dict[str, Form] = {
        "fp32": Form(),
        "fp16": HalfForm(),
        "int8": int8,
        "int4": Int4Form(int4_block_size, method, 4),
    }
    form = forms[precision]
    if not keep or precision in ("fp32", "fp16"):
        return form
    kept = {pattern: forms[p] for pattern, p in keep.items() if p != precision}
    if not kept:
        return form
    mixed = MixedForm(form, kept)
    int8.keep_plans(lambda label: mixed.form_of(label) is int8)
    return mixed


def int4_form_of(form: Form, lin: Lin, tap: Tap) -> Int4Form | None:
    """The 4-bit form that stores a Linear, ``None`` where it is kept at another precision."""
    if isinstance(form, MixedForm):
        form = form.form_of(*(other.label for other in tap.lins))
    return form if isinstance(form, Int4Form) else None


def store_gptq(
    family: Family,
    weights: TaskWeights,
    form: Form,
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
        weights: the tensors to run and to quantize: a task's, or the backbone's.
        form: the precision's form.
        batches: calibration tokens.
        store: takes the results under the recipe keys that the graph will ask for.
        task: for the progress line.
        wanted: whether the weight of this canonical name is to be quantized in this pass.
        file: the weight file for new tensors.
        report: takes progress lines.
    """
    g = Graph(weights=weights, form=form)

    def jobs(tap: Tap) -> list[Lin]:
        return [
            lin
            for lin in tap.lins
            if wanted(weight_name(lin))
            and (f := int4_form_of(form, lin, tap)) is not None
            and not store.has(f.weight_recipe(g, lin).key)
        ]

    passes = calibrate(
        family,
        weights,
        batches,
        scratch=store.folder,
        wants_hessian=lambda tap: bool(jobs(tap)),
    )
    for index, statistics in passes:
        report(f"{task}: GPTQ, layer {index + 1} of {family.num_layers}")
        for value in statistics.values():
            _quantize_group(g, form, value, jobs(value.tap), store, file)


def _quantize_group(
    g: Graph,
    form: Form,
    value: InputStatistics,
    lins: Sequence[Lin],
    store: TensorStore,
    file: str,
) -> None:
    """Quantize the Linears that share an input, with its Hessian."""
    if not lins or value.hessian is None:
        return
    hessian = value.hessian
    try:
        upper = _gptq.inverse_factor(hessian)  # also damps the Hessian's diagonal a little
    except ArithmeticError as problem:
        raise CheckpointError(f"{lins[0].label}: GPTQ is not possible here: {problem}") from problem
    for lin in lins:
        int4 = int4_form_of(form, lin, value.tap)
        assert int4 is not None
        weight = read_linear(g, lin)
        levels, scales, zeros = _gptq.quantize_blocks(weight, upper, int4.block_size)
        parts = _int4.split_blocks(weight, int4.block_size)
        noise = reported_db(_int4.blocks_sqnr_db(parts, levels, scales, zeros))
        restored = _int4.dequantize(levels, scales, zeros).reshape(out_features(g, lin), -1)
        error = _output_error(weight, restored[:, : in_features(g, lin)], hessian)
        recipe, packed = int4.weight_recipe(g, lin), pack(levels, scales, zeros)
        del weight, parts, levels, restored  # what follows reads the weight again
        if lin is lins[-1]:
            del upper
        store.put(recipe, packed, file, {"sqnr_db": noise, "output_error": error})
    value.hessian = None


def _output_error(weight: Any, restored: Any, hessian: Any) -> float:
    """``‖(W - W_q)·X‖ / ‖W·X‖`` over the calibration tokens."""
    noise = signal = 0.0
    for start in range(0, len(weight), _ERROR_ROWS):  # bounds the memory of the products
        part = weight[start : start + _ERROR_ROWS]
        difference = part - restored[start : start + _ERROR_ROWS]
        noise += float(np.einsum("ij,ij->", difference @ hessian, difference))
        signal += float(np.einsum("ij,ij->", part @ hessian, part))
    return round(float(np.sqrt(max(noise, 0.0) / signal)), 6) if signal > 0 else 0.0


__all__ = ["int8_plans", "make_form", "store_gptq", "token_batches"]
