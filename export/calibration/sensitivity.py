"""Which layers of an int4 export are worth 8 bits, under a budget of bytes.

Every Linear input is asked what the model's vectors lose when its Linears alone have 4 bits: their weights
are rounded to nearest, and a sample of the calibration texts runs through the rest of the model as it is,
for all inputs side by side, layer by layer. The inputs with the largest loss per byte get 8 bits, until
the budget is used up. What 8 bits lose, and what rounding activations does, is not counted. The choice
depends on the backbone alone, so that tasks share tensors.

How far the rounding moves a Linear's own output says little about the vector: on MiniLM its order agrees
with what 8 bits win in the exported model at a rank correlation of .28 (lab note 43).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedge.export.calibration.layers import (
    HIDDEN,
    Layer,
    behind_states,
    first_states,
)
from embedge.export.calibration.tokens import TokenBatch, token_batches
from embedge.export.calibration.weight_session import WeightSession
from embedge.export.graph.architecture import Architecture
from embedge.export.graph.builder import Graph
from embedge.export.graph.task_graph import embedding, token_vectors
from embedge.export.graph.values import Value
from embedge.export.model import Model
from embedge.export.schemes.floats import Float32Scheme
from embedge.export.schemes.int4 import Int4Scheme
from embedge.export.schemes.int8 import Int8Scheme
from embedge.export.schemes.mixed import first_match
from embedge.export.weights.tensors import Weights
from embedge.runtime.errors import EmbedgeValueError

FloatArray = NDArray[np.float32]
_MOST_TOKENS = 2048
_MOST_TEXT_TOKENS = 64
_FEWEST_TEXTS = 16
_STATE_BYTES = 256 * 1024 * 1024  # of all inputs' states, float32


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
    *,
    int4: Int4Scheme,
    keep: Mapping[str, str],
    scratch: Path,
    report: Callable[[int], None],
) -> list[Candidate]:
    """What 8 bits would gain at every Linear input of the backbone whose precision is still open.

    Args:
        model: the model.
        base: the backbone's tensors, rotated if the export's are.
        batches: calibration tokens, of which a sample is used; at least one.
        int4: the 4-bit scheme.
        keep: precisions by pattern that are decided already.
        scratch: folder for a layer's weights.
        report: takes the number of each layer that is measured.
    """
    architecture = model.architecture.text_only()
    g, int8 = Graph(weights=base, scheme=Float32Scheme()), Int8Scheme({})
    sample = _sample(architecture, batches)
    hidden, norm = first_states(architecture, base, sample, scratch)
    first = list(hidden)
    moved: list[list[FloatArray]] = [[] for _ in sample]  # states by batch, then by input
    labels: list[tuple[str, ...]] = []
    extra: list[int] = []
    for index in range(len(architecture.layers)):
        report(index + 1)
        layer = Layer(architecture, base, index, norm, scratch)
        norm = layer.norm
        for batch, start, states in zip(sample, first, moved, strict=True):
            _run_together(layer, batch, start, states)
        for group in layer.linear_groups.values():
            names = group.labels
            if first_match(keep, *names) is not None:
                continue
            changed = {
                linear.label: int4.restored(group, np.array(layer.weight(linear).T, order="C"))
                for linear in group.linears
            }
            for batch, start, before, states in zip(sample, first, hidden, moved, strict=True):
                states.append(layer.run(batch, before, start, changed)[0])
            del changed
            labels.append(names)
            eight, four = (
                sum(
                    spec.nbytes
                    for linear in group.linears
                    for spec in scheme.weight(g, group, linear).specs
                )
                for scheme in (int8, int4)
            )
            extra.append(eight - four)
        hidden = [
            layer.run(batch, x, start)[0]
            for batch, x, start in zip(sample, hidden, first, strict=True)
        ]
        del layer
    vectors_of = _head(model, base, sample, scratch)
    exact = vectors_of(hidden)
    found = []
    for number, names in enumerate(labels):
        vectors = vectors_of([states[number] for states in moved])
        gain = float(np.square(exact - vectors, dtype=np.float64).sum(axis=1).mean() / 2)
        found.append(Candidate(labels=names, gain=gain, extra_bytes=extra[number]))
    return found


def check_budget(smallest: int, budget: int, *, branches: bool) -> None:
    """Refuse a budget that 4 bits everywhere break already.

    Args:
        smallest: bytes of a task's tensors with 4 bits everywhere.
        budget: most bytes of them.
        branches: whether branches are among them.

    Raises:
        EmbedgeValueError: naming both sizes.
    """
    if budget < smallest:
        kind, fewer = (
            ("int4 with branches", ", or a lower branch_rank") if branches else ("int4", "")
        )
        raise EmbedgeValueError(
            f"budget {budget:,} bytes: a task at {kind} takes {smallest:,}; give at least that, or a larger "
            f"int4_block_size{fewer}"
        )


def within_budget(found: Sequence[Candidate], smallest: int, budget: int) -> list[str]:
    """Labels of the Linears that get 8 bits: the largest gains per byte that fit.

    Args:
        found: from :func:`candidates`.
        smallest: bytes of a task's tensors with 4 bits everywhere.
        budget: most bytes of a task's tensors, see :func:`check_budget`.
    """
    chosen: list[str] = []
    left = budget - smallest
    for candidate in sorted(found, key=lambda c: (-c.gain / max(1, c.extra_bytes), c.labels)):
        if candidate.extra_bytes <= left:
            left -= candidate.extra_bytes
            chosen += candidate.labels
    return chosen


def _sample(architecture: Architecture, batches: Sequence[TokenBatch]) -> list[TokenBatch]:
    """Some of the texts, of all lengths, as many tokens as all inputs' states have room for.

    A long text is its start and its last token, which some models pool.
    """
    rows = [
        ids[: int(mask.sum())]
        for batch in batches
        for ids, mask in zip(batch.ids, batch.mask, strict=True)
    ]
    inputs = 4 * len(architecture.layers)  # of a layer's Linears: q, k and v; o; gate and up; down
    tokens = min(_MOST_TOKENS, _STATE_BYTES // (4 * architecture.hidden_size * inputs))
    longest = max(2, min(_MOST_TEXT_TOKENS, tokens // _FEWEST_TEXTS))
    count = max(1, tokens // longest)
    indices = np.unique(np.linspace(0, len(rows) - 1, count).round().astype(int))
    texts = [rows[index].tolist() for index in indices]
    texts = [t if len(t) <= longest else [*t[: longest - 1], t[-1]] for t in texts]
    return token_batches(texts, 0, architecture.hidden_size)


def _run_together(
    layer: Layer, batch: TokenBatch, first: FloatArray, states: list[FloatArray]
) -> None:
    """Run several states of the same tokens through a layer, in place, a few thousand tokens at once."""
    step = max(1, _MOST_TOKENS // batch.ids.size)
    for start in range(0, len(states), step):
        part = states[start : start + step]
        tiled = TokenBatch(
            ids=np.tile(batch.ids, (len(part), 1)), mask=np.tile(batch.mask, (len(part), 1))
        )
        starts = np.tile(first, (len(part), 1, 1))
        result, _ = layer.run(tiled, np.concatenate(part), starts)
        # copies: a view would keep the whole result
        states[start : start + step] = [x.copy() for x in np.split(result, len(part))]


def _head(
    model: Model, weights: Weights, sample: Sequence[TokenBatch], scratch: Path
) -> Callable[[Sequence[FloatArray]], FloatArray]:
    """From states behind the last layer, by batch, to vectors of length 1, float32 ``[texts, dim]``.

    With late interaction they are those of tokens, ``[tokens, dim]``.
    """
    architecture = model.architecture.text_only()
    transformer = behind_states(architecture, weights)
    last = transformer.final(Value(HIDDEN))
    dense = model.settings.dense
    if model.pooling is None:
        token_vectors(transformer, last, dense=dense, normalize=True)
    else:
        embedding(transformer, last, pooling=model.pooling, dense=dense, normalize=True)
    session = WeightSession(transformer.g, scratch)

    def vectors(states: Sequence[FloatArray]) -> FloatArray:
        results = []
        for batch, hidden in zip(sample, states, strict=True):
            feeds: dict[str, NDArray[Any]] = {**batch.feeds(architecture.inputs), HIDDEN: hidden}
            result = session.run(feeds)[0]
            results.append(result[batch.mask == 1] if model.pooling is None else result)
        return np.concatenate(results)

    return vectors
