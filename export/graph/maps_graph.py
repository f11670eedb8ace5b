"""A graph of several tasks' vectors: the one of a base task, pools of its states, and maps of those.

The base task's graph stays as it is, down to its external data. Nodes are put after it, whose names begin with
``maps.``, so that none meets one of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import numpy as np
from onnx import ModelProto, TensorProto, helper

from embedge.export.graph.ops import CONTRIB, OpBuilder
from embedge.export.graph.pooling import Pooled, pool, unit_length
from embedge.export.graph.values import Value
from embedge.quant.task_maps import TaskMaps
from embedge.runtime.bundle.manifest import POOL_MASK

__all__ = ["Pool", "maps_graph", "pools_graph", "stated", "to_maps_model"]

_STATES = "embedge.states"
_MOST_JOINED = 6  # inputs of a Concat, see runtime/bundle/operators.py


class Pool(NamedTuple):
    """A pooling of a graph's states.

    Attributes:
        state: their number: 0 before the first layer, ``n`` after the n-th.
        kind: "mean", "max", "cls" or "lasttoken".
    """

    state: int
    kind: str


class _NoTensors:
    """The tensors of a graph that is read, not made: none can be asked for."""

    def has(self, name: str) -> bool:
        return False

    def shape(self, name: str) -> NoReturn:
        raise KeyError(name)

    def read(self, name: str, rows: slice | None = None) -> NoReturn:
        raise KeyError(name)

    def version(self, name: str) -> NoReturn:
        raise KeyError(name)

    def absorbed(self, norm: str) -> bool:
        return False


@dataclass
class _Continued(OpBuilder):
    """A graph that is there already, under continuation."""

    @classmethod
    def of(cls, model: ModelProto) -> _Continued:
        """The nodes, inputs and initializers of a model; its outputs are values like others."""
        return cls(
            weights=_NoTensors(),
            nodes=list(model.graph.node),
            inputs=list(model.graph.input),
            constants={tensor.name: tensor for tensor in model.graph.initializer},
        )

    def const(self, value: Any, dtype: Any = np.float32, name: str | None = None) -> Value:
        return super().const(value, dtype, name or f"maps.const_{len(self.constants)}")

    def op_n(
        self,
        op_type: str,
        count: int,
        *inputs: str,
        domain: str = "",
        name: str | None = None,
        **attributes: Any,
    ) -> list[Value]:
        name = name or f"maps.{op_type}_{self._counter + 1}"
        return super().op_n(op_type, count, *inputs, domain=domain, name=name, **attributes)


def stated(model: ModelProto) -> list[str] | None:
    """Names of a graph's states before the first layer and after each; ``None`` in one of before 1.8."""
    notes = {entry.key: entry.value for entry in model.metadata_props}
    return json.loads(notes[_STATES]) if _STATES in notes else None


def pools_graph(model: ModelProto, pools: Sequence[Pool]) -> OpBuilder:
    """The graph of a base task with the output ``pools`` alone, float32 ``[batch, width]``.

    Args:
        model: the base task's graph, with its notes.
        pools: what is put behind its ``embedding``.
    """
    g = _Continued.of(model)
    g.output(_pooled(g, model, pools), "pools", TensorProto.FLOAT, ["batch", "width"])
    g.prune()
    return g


def maps_graph(model: ModelProto, pools: Sequence[Pool], maps: TaskMaps) -> OpBuilder:
    """The graph with the output ``embeddings`` alone, float32 ``[batch, tasks, dim]``: first the base's own vectors.

    Args:
        model: the base task's graph, with its notes.
        pools: as those that the maps were fitted on.
        maps: of the other tasks.
    """
    g = _Continued.of(model)
    pooled = _pooled(g, model, pools)
    y = g.op("Add", _times(g, pooled, maps.linear, "linear"), _offset(g, maps.offset, "offset"))
    if maps.inner.shape[1]:
        inner = _times(g, pooled, maps.inner, "inner")
        inner = g.op("Add", inner, _offset(g, maps.inner_offset, "inner_offset"))
        y = g.op("Add", y, _times(g, g.op("Gelu", inner, domain=CONTRIB), maps.outer, "outer"))
    dim = maps.linear.shape[1] // len(maps.tasks)
    y = g.op("Reshape", y, g.const([-1, len(maps.tasks), dim], "int64"))
    if maps.normalize:
        y = unit_length(g, y)
    base = g.op("Unsqueeze", "embedding", g.const([1], "int64"))
    y = g.op("Concat", base, y, axis=1)
    g.output(y, "embeddings", TensorProto.FLOAT, ["batch", len(maps.tasks) + 1, dim])
    g.prune()
    return g


def to_maps_model(
    model: ModelProto, g: OpBuilder, tensors: Sequence[TensorProto], notes: Mapping[str, str]
) -> ModelProto:
    """A continued graph as a model.

    Args:
        model: the base task's.
        g: what became of its graph.
        tensors: of the initializers that were added.
        notes: its metadata, in the place of the base's.
    """
    graph = helper.make_graph(
        g.nodes, "maps", g.inputs, g.outputs, initializer=[*g.constants.values(), *tensors]
    )
    result = ModelProto()
    result.CopyFrom(model)
    result.graph.CopyFrom(graph)
    del result.metadata_props[:]
    helper.set_model_props(result, dict(notes))
    return result


def _pooled(g: OpBuilder, model: ModelProto, pools: Sequence[Pool]) -> Value:
    """float32 ``[batch, width]``: the base's vector, and behind it the pools."""
    states = stated(model)
    assert states is not None
    inputs = {value.name for value in model.graph.input}
    lengths = g.op("ReduceSum", "attention_mask", g.const([1], "int64"), keepdims=0)
    tokens = g.op(
        "Gather", g.op("Shape", "attention_mask"), g.const(1, "int64", "maps.axis"), axis=0
    )
    skips = POOL_MASK in inputs
    of = Pooled(
        tokens=tokens,
        lengths=lengths,
        mask=POOL_MASK if skips else "attention_mask",
        skips=skips,
    )
    parts = [Value("embedding"), *(pool(g, states[p.state], p.kind, of) for p in pools)]
    while len(parts) > 1:
        joined, rest = parts[:_MOST_JOINED], parts[_MOST_JOINED:]
        parts = [g.op("Concat", *joined, axis=-1), *rest]
    return parts[0]


def _times(g: OpBuilder, x: str, matrix: np.ndarray[Any, Any], name: str) -> Value:
    return g.op("MatMul", x, _weight(g, matrix, name))


def _offset(g: OpBuilder, values: np.ndarray[Any, Any], name: str) -> Value:
    return _weight(g, values, name)


def _weight(g: OpBuilder, array: np.ndarray[Any, Any], name: str) -> Value:
    name = f"maps.{name}"
    return g.computed(name, array.shape, lambda: np.ascontiguousarray(array, np.float32), key=name)
