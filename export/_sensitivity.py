"""Which layers of an int4 export are worth 8 bits, under a budget of bytes.

Every Linear input is asked what the model's vectors lose when its Linears alone have 4 bits: their weights
are rounded to nearest, and a sample of the calibration texts runs through the rest of the model as it is,
for all inputs side by side, layer by layer. The inputs with the largest loss per byte get 8 bits, until
the budget is used up. What 8 bits lose is a few hundredths of that and not counted. The choice depends
on the backbone alone, so that tasks share tensors.

How far the rounding moves a Linear's own output says little about the vector: on MiniLM its order agrees
with what 8 bits win in the exported model at a rank correlation of .28 (bench/LOG.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embedge.export._assemble import embedding
from embedge.export._calibration import Layer, TokenBatch, first_states, open_session
from embedge.export._forms import Form, read_linear
from embedge.export._graph import Graph, Lin, Norm, Weights
from embedge.export._int4_form import Int4Form
from embedge.export._int8_form import Int8Form
from embedge.export._model import Model
from embedge.export._precision import token_batches
from embedge.export.families import Family
from embedge.quant import _int4
from embedge.runtime._errors import EmbedgeValueError

FloatArray = NDArray[np.float32]
_MOST_TOKENS = 2048
_TEXT_TOKENS = 64
_FEWEST_TEXTS = 4
_STATE_BYTES = 256 * 1024 * 1024  # of the states of all inputs


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """The Linears of one input.

    Attributes:
        labels: of the Linears.
        gain: ``1 - cosine`` of the vectors, on average, that 8 bits would take away.
        extra_bytes: what 8 bits take more than 4.
    """

    labels: tuple[str, ...]
    gain: float
    extra_bytes: int


def candidates(
    model: Model,
    base: Weights,
    batches: Sequence[TokenBatch],
    block_size: int,
    scratch: Path,
    report: Callable[[str], None],
) -> list[Candidate]:
    """What 8 bits would gain at every Linear input of the backbone.

    Args:
        model: the model.
        base: the backbone's tensors, rotated if the export's are.
        batches: calibration tokens, of which a sample is used.
        block_size: of the 4-bit form.
        scratch: folder for a layer's weights.
        report: takes progress lines.
    """
    family = model.family.text_only()
    g = Graph(weights=base, form=Form())
    four, eight = Int4Form(block_size, "rtn", 4), Int8Form({})
    sample = _sample(family, batches)
    hidden, norm = first_states(family, base, sample, scratch)
    labels: list[tuple[str, ...]] = []
    extra: list[int] = []
    moved: list[list[FloatArray]] = []  # the states by input, then by batch
    for index in range(family.num_layers):
        report(f"measuring sensitivity, layer {index + 1} of {family.num_layers}")
        layer = Layer(family, base, index, norm, scratch=scratch)
        norm = layer.norm
        for states in moved:
            for number, batch in enumerate(sample):
                states[number] = layer.run(batch, states[number])[0]
        for tap in layer.taps.values():
            changed = {lin.label: _rounded(g, lin, block_size) for lin in tap.lins}
            runs = zip(sample, hidden, strict=True)
            moved.append([layer.run(batch, states, changed)[0] for batch, states in runs])
            labels.append(tuple(lin.label for lin in tap.lins))
            extra.append(
                sum(
                    spec.nbytes * sign
                    for form, sign in ((eight, 1), (four, -1))
                    for lin in tap.lins
                    for spec in form.weight_recipe(g, tap, lin).specs
                )
            )
        hidden = [layer.run(batch, x)[0] for batch, x in zip(sample, hidden, strict=True)]
        del layer
    vectors = _vectors(model, family, base, sample, [hidden, *moved], norm, scratch)
    return [
        Candidate(labels=names, gain=_distance(vectors[0], other), extra_bytes=size)
        for names, size, other in zip(labels, extra, vectors[1:], strict=True)
    ]


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


def _sample(family: Family, batches: Sequence[TokenBatch]) -> list[TokenBatch]:
    """Starts of some of the texts, of all lengths, as many as all inputs' states have room for."""
    rows = [
        ids[: int(mask.sum())]
        for batch in batches
        for ids, mask in zip(batch.ids, batch.mask, strict=True)
    ]
    inputs = 4 * family.num_layers  # of a layer's Linears: q, k and v; o; gate and up; down
    room = _STATE_BYTES // (4 * family.hidden_size * inputs)
    count = max(_FEWEST_TEXTS, min(_MOST_TOKENS, room) // _TEXT_TOKENS)
    places = np.unique(np.linspace(0, len(rows) - 1, count).round().astype(int))
    texts = [rows[place][:_TEXT_TOKENS].tolist() for place in places]
    return token_batches(texts, 0, family.hidden_size)


def _rounded(g: Graph, lin: Lin, block_size: int) -> FloatArray:
    """A Linear's transposed weight ``[in, out]`` after rounding to 4 bits and back."""
    weight = read_linear(g, lin)
    parts = _int4.split_blocks(weight, block_size)
    scales, zeros = _int4.block_grid(parts)
    restored = _int4.dequantize(_int4.quantize(parts, scales, zeros), scales, zeros)
    return np.ascontiguousarray(restored.reshape(len(weight), -1)[:, : weight.shape[1]].T)


def _vectors(
    model: Model,
    family: Family,
    weights: Weights,
    sample: Sequence[TokenBatch],
    states: Sequence[Sequence[FloatArray]],
    norm: Norm | None,
    scratch: Path,
) -> list[FloatArray]:
    """Vectors of length 1, float32 ``[texts, dim]``, for each set of states behind the last layer."""
    g = Graph(weights=weights, form=Form())
    family.declare_inputs(g)
    hidden = "hidden"
    g.input(hidden, 1, ["batch", "tokens", family.hidden_size])
    if norm is not None:
        g.norms[hidden] = norm
    context = family.context(g)
    last = family.final(g, context, hidden)
    settings = model.settings
    embedding(g, family, context, last, pooling=model.pooling, dense=settings.dense, normalize=True)
    session, constants = open_session(g, scratch)
    accepted = {i.name for i in session.get_inputs()}
    results = []
    for by_batch in states:
        vectors = []
        for batch, values in zip(sample, by_batch, strict=True):
            feeds = {**batch.feeds(family.inputs), **constants, hidden: values}
            feeds = {name: value for name, value in feeds.items() if name in accepted}
            vectors.append(session.run(["embedding"], feeds)[0])
        results.append(np.concatenate(vectors))
    return results


def _distance(a: FloatArray, b: FloatArray) -> float:
    """``1 - cosine`` of rows of length 1, on average, without the cancellation."""
    return float(np.square(a - b, dtype=np.float64).sum(axis=1).mean() / 2)
