"""Running calibration texts through the unquantized model, one layer at a time.

Only one layer's weights (mapped from a file) and the states of the calibration tokens are held. A layer
runs in ONNX Runtime as a graph whose weights are inputs, written by the same code as the
exported graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from embedge.export.calibration.statistics import InputStatistics
from embedge.export.calibration.tokens import TokenBatch
from embedge.export.calibration.weight_session import WeightSession
from embedge.export.errors import CheckpointError
from embedge.export.graph.architecture import TOKENS, Architecture
from embedge.export.graph.builder import Graph
from embedge.export.graph.ops import OpBuilder
from embedge.export.graph.transformer import TransformerGraph
from embedge.export.graph.values import LinearGroup, LinearRef, Norm, Value
from embedge.export.schemes.floats import Float32Scheme
from embedge.export.weights.tensors import Weights

FloatArray = NDArray[np.float32]

HIDDEN = "hidden"  # the input of token states
FIRST = "first_hidden"  # those before the first layer, where later ones read them
_SAMPLE_ROWS = 1024
_TABLE_ROWS = 2048


def calibrate(
    architecture: Architecture,
    weights: Weights,
    batches: Sequence[TokenBatch],
    *,
    scratch: Path,
    wants_hessian: Callable[[LinearGroup], bool] = lambda group: False,
    wants_sample: Callable[[LinearGroup], bool] = lambda group: False,
) -> Iterator[tuple[int, dict[str, InputStatistics]]]:
    """Yield each layer's index and the statistics of its Linear inputs, by label.

    Args:
        architecture: the model.
        weights: the tensors to run with: the backbone's or a task's.
        batches: calibration tokens.
        scratch: folder for a layer's merged weights, which are mapped from there: pages that the
            system can drop, not memory of the process.
        wants_hessian: for which inputs ``Σ x xᵀ`` is accumulated.
        wants_sample: for which inputs some rows are kept.
    """
    every = max(1, sum(int(batch.mask.sum()) for batch in batches) // _SAMPLE_ROWS)
    hidden, norm = first_states(architecture, weights, batches, scratch)
    first = list(hidden)
    for index in range(len(architecture.layers)):
        layer = Layer(architecture, weights, index, norm, scratch)
        linear_groups, norm = layer.linear_groups, layer.norm
        statistics = {
            label: InputStatistics(
                group,
                weights.shape(group.linears[0].weight)[1],
                scratch if wants_hessian(group) else None,
            )
            for label, group in linear_groups.items()
        }
        for label, group in linear_groups.items():
            for linear in group.linears:
                matrix = layer.weight(linear)
                peak = statistics[label].weight_peak
                np.maximum(peak, np.abs(matrix).max(axis=1), out=peak)
                statistics[label].matrices.append(matrix)
        for number, batch in enumerate(batches):
            hidden[number], values = layer.run(batch, hidden[number], first[number])
            attended = batch.mask.astype(bool)
            for label, inputs in values.items():
                rows = inputs[attended]
                statistics[label].add(rows)
                if wants_sample(linear_groups[label]):
                    statistics[label].sample.append(rows[::every].copy())
            del values
        del layer
        for label, value in statistics.items():
            value.finish()
            if not (np.isfinite(value.low) & np.isfinite(value.high)).all():
                raise CheckpointError(
                    f"{label}: expected finite inputs for the calibration texts, found NaN or "
                    "infinity; the weights overflow float32. Check the model and its adapter"
                )
        yield index, statistics
        del statistics


class Layer:
    """One layer of the unquantized model as a session whose weights are inputs.

    Attributes:
        linear_groups: inputs of its Linears, by label.
        norm: what made its result, where a norm did.

    Args:
        architecture: the model.
        weights: the tensors to run with.
        index: of the layer.
        norm: what made the states that it gets, where a norm did.
        scratch: folder for its weights, which are mapped from there.
    """

    def __init__(
        self,
        architecture: Architecture,
        weights: Weights,
        index: int,
        norm: Norm | None,
        scratch: Path,
    ) -> None:
        transformer = behind_states(architecture, weights)
        g, hidden = transformer.g, Value(HIDDEN)
        if architecture.token_gates:
            axes = [*TOKENS, architecture.hidden_size]
            transformer.first = g.input(FIRST, TensorProto.FLOAT, axes)
        hidden.norm = norm
        states = transformer.layer(index, hidden)
        self.norm = states.norm
        self.linear_groups = g.linear_groups
        g.output(states, "hidden_out", TensorProto.FLOAT, [])
        for label, group in self.linear_groups.items():
            g.output(group.value, f"group/{label}", TensorProto.FLOAT, [])
        self._inputs = architecture.inputs
        self._session = WeightSession(g, scratch)

    def weight(self, linear: LinearRef) -> FloatArray:
        """The transposed weight of a Linear, float32 ``[in, out]``."""
        return self._session.weights[f"{linear.label}.weight"]

    def run(
        self,
        batch: TokenBatch,
        hidden: FloatArray,
        first: FloatArray,
        changed: Mapping[str, FloatArray] | None = None,
    ) -> tuple[FloatArray, dict[str, FloatArray]]:
        """Run the layer.

        Args:
            batch: the tokens.
            hidden: float32 ``[batch, tokens, hidden]``, the states before the layer.
            first: likewise, those before the first layer.
            changed: weights as of :meth:`weight` to take in place of the layer's, by the Linear's label.

        Returns:
            The states behind it, and the inputs of its Linears by label.
        """
        weights = {f"{label}.weight": value for label, value in (changed or {}).items()}
        feeds: dict[str, NDArray[Any]] = {
            **batch.feeds(self._inputs),
            HIDDEN: hidden,
            FIRST: first,
            **weights,
        }
        states, *values = self._session.run(feeds)
        return states, dict(zip(self.linear_groups, values, strict=True))


def first_states(
    architecture: Architecture, weights: Weights, batches: Sequence[TokenBatch], scratch: Path
) -> tuple[list[FloatArray], Norm | None]:
    """The states before the first layer, float32 ``[batch, tokens, hidden]`` each, and their norm."""
    scheme = _TableRows(batches)
    g = Graph(weights=weights, scheme=scheme)
    states = TransformerGraph(g, architecture).embed()
    g.output(states, HIDDEN, TensorProto.FLOAT, [])
    session = WeightSession(g, scratch)
    hidden = []
    for batch in batches:
        feeds = {**batch.feeds(architecture.inputs), "input_ids": scheme.local_ids(batch.ids)}
        hidden.append(session.run(feeds)[0])
    return hidden, states.norm


class _TableRows(Float32Scheme):
    """Looks tokens up in a table cut to the rows that calibration uses."""

    def __init__(self, batches: Sequence[TokenBatch]) -> None:
        self._rows = np.unique(np.concatenate([b.ids.ravel() for b in batches]))

    def embedding(self, g: OpBuilder, name: str, ids: str) -> Value:
        shape = (len(self._rows), g.weights.shape(name)[1])
        table = g.computed(name, shape, lambda: self._read(g.weights, name), name)
        return g.op("Gather", table, ids)

    def _read(self, weights: Weights, name: str) -> FloatArray:
        """The used rows, from parts of the table, which may be large."""
        count = weights.shape(name)[0]
        parts = []
        for start in range(0, count, _TABLE_ROWS):
            stop = min(start + _TABLE_ROWS, count)
            used = self._rows[(self._rows >= start) & (self._rows < stop)] - start
            if len(used):
                parts.append(weights.read(name, slice(start, stop))[used])
        return np.concatenate(parts)

    def local_ids(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Row numbers in the cut table."""
        return np.searchsorted(self._rows, ids)


def behind_states(architecture: Architecture, weights: Weights) -> TransformerGraph:
    """A float32 graph whose input ``HIDDEN`` is token states."""
    g = Graph(weights=weights, scheme=Float32Scheme())
    g.input(HIDDEN, TensorProto.FLOAT, [*TOKENS, architecture.hidden_size])
    return TransformerGraph(g, architecture)
