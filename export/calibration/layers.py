"""Running calibration texts through the unquantized model, one layer at a time.

Only one layer's weights (mapped from a file) and the states of the calibration tokens are held. A layer
runs in ONNX Runtime as a graph whose weights are inputs, written by the same family code as the
exported graph.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from embedge.export.calibration.tokens import TokenBatch
from embedge.export.errors import CheckpointError
from embedge.export.graph.architecture import TOKENS, Architecture
from embedge.export.graph.builder import Graph
from embedge.export.graph.onnx_model import to_model
from embedge.export.graph.ops import OpBuilder
from embedge.export.graph.transformer import TransformerGraph
from embedge.export.graph.values import LinearGroup, LinearRef, Norm, Value
from embedge.export.schemes.floats import Float32Scheme
from embedge.export.weights.tensors import Weights
from embedge.runtime.host.onnxruntime import load_onnxruntime, open_session

FloatArray = NDArray[np.float32]

HIDDEN = "hidden"  # the input of token states
SPILL_BYTES = 4 * 1024 * 1024
_HESSIAN_ROWS = 1024
_SAMPLE_ROWS = 1024
_TABLE_ROWS = 2048


class InputStatistics:
    """What is known of a Linear's input after calibration.

    Attributes:
        low: float32 ``[in]``, smallest value of every channel.
        high: float32 ``[in]``, largest value.
        rows: tokens seen.
        hessian: float32 ``[in, in]`` ``Σ x xᵀ``, or ``None`` when it was not asked for.
        group: where in the graph the input is.
        sample: float32 ``[rows, in]`` parts, some of the rows, where they were asked for.
        matrices: float32 ``[in, out]`` weights of the Linears that read the input, until the next layer.

    Args:
        group: see above.
        width: its channels.
        scratch: folder for a large Hessian, which is mapped from there; ``None``: it is not wanted.
    """

    def __init__(self, group: LinearGroup, width: int, scratch: Path | None) -> None:
        self.group = group
        self.rows = 0
        self.low = np.full(width, np.inf, np.float32)
        self.high = np.full(width, -np.inf, np.float32)
        self.total = np.zeros(width, np.float64)
        self.hessian = None if scratch is None else _zeros((width, width), scratch)
        self.weight_peak = np.zeros(width, np.float32)
        self.sample: list[FloatArray] = []
        self.matrices: list[FloatArray] = []

    def add(self, x: FloatArray) -> None:
        """Account for float32 ``[rows, in]`` of attended tokens."""
        self.rows += len(x)
        np.minimum(self.low, x.min(axis=0), out=self.low)
        np.maximum(self.high, x.max(axis=0), out=self.high)
        self.total += x.sum(axis=0, dtype=np.float64)
        if self.hessian is not None:
            for start in range(0, len(self.hessian), _HESSIAN_ROWS):  # bounds the product's memory
                rows = slice(start, start + _HESSIAN_ROWS)
                self.hessian[rows] += x[:, rows].T @ x


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
            hidden[number], values = layer.run(batch, hidden[number])
            attended = batch.mask.astype(bool)
            for label, inputs in values.items():
                rows = inputs[attended]
                statistics[label].add(rows)
                if wants_sample(linear_groups[label]):
                    statistics[label].sample.append(rows[::every].copy())
            del values
        del layer
        for label, value in statistics.items():
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
        changed: Mapping[str, FloatArray] | None = None,
    ) -> tuple[FloatArray, dict[str, FloatArray]]:
        """Run the layer.

        Args:
            batch: the tokens.
            hidden: float32 ``[batch, tokens, hidden]``, the states before the layer.
            changed: weights as of :meth:`weight` to take in place of the layer's, by the Linear's label.

        Returns:
            The states behind it, and the inputs of its Linears by label.
        """
        weights = {f"{label}.weight": value for label, value in (changed or {}).items()}
        feeds: dict[str, NDArray[Any]] = {
            **batch.feeds(self._inputs),
            HIDDEN: hidden,
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


class WeightSession:
    """A graph whose weights are inputs, so that ONNX Runtime keeps no packed copies.

    Attributes:
        weights: by the name of their input; large ones are mapped from files in ``scratch``.

    Args:
        g: the graph, which this completes.
        scratch: folder for large weights.
    """

    def __init__(self, g: Graph, scratch: Path) -> None:
        g.prune()
        self.weights: dict[str, FloatArray] = {}
        for initializer in g.initializers.values():
            for spec, array in zip(initializer.specs, initializer.compute(), strict=True):
                self.weights[spec.name] = _spilled(np.ascontiguousarray(array), scratch)
                info = helper.make_tensor_value_info(spec.name, spec.elem_type, spec.shape)
                g.inputs.append(info)
        for output in g.outputs:
            output.type.tensor_type.ClearField("shape")
        options = load_onnxruntime().SessionOptions()
        options.enable_cpu_mem_arena = False
        options.log_severity_level = 3
        model = to_model(g, [], "calibration", {})
        self._session = open_session(model.SerializeToString(), options, ["CPUExecutionProvider"])
        self._inputs = {i.name for i in self._session.get_inputs()}

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> list[FloatArray]:
        """The outputs for some inputs, of which the graph takes those it has, and its weights.

        Args:
            feeds: by name; a weight among them replaces the session's own.
        """
        given = {**self.weights, **feeds}
        accepted = {name: value for name, value in given.items() if name in self._inputs}
        outputs: list[FloatArray] = self._session.run(None, accepted)
        return outputs


def _spilled(array: FloatArray, scratch: Path) -> FloatArray:
    """A large array as a mapped file that has no name any more; a small one as it is."""
    if array.nbytes < SPILL_BYTES:
        return array
    with tempfile.TemporaryFile(dir=scratch) as file:
        array.tofile(file)
        file.flush()
        return np.memmap(file, array.dtype, "r", shape=array.shape)


def _zeros(shape: tuple[int, int], scratch: Path) -> FloatArray:
    """Zeros, in a mapped file that has no name where they are many."""
    nbytes = 4 * shape[0] * shape[1]
    if nbytes < SPILL_BYTES:
        return np.zeros(shape, np.float32)
    with tempfile.TemporaryFile(dir=scratch) as file:
        for start in range(0, nbytes, 1 << 20):  # a full disk is an error here, not a crash later
            file.write(bytes(min(1 << 20, nbytes - start)))
        file.flush()
        return np.memmap(file, np.float32, "r+", shape=shape)
