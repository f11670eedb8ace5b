"""Writing an ONNX graph node by node, with weights as lazy initializers.

No weight is read here: a :class:`LazyInitializer` knows how to make its tensors when their bytes are wanted,
and is dropped right after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from onnx import AttributeProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from embedge.export.graph.initializers import LazyInitializer, TensorSpec, UnpackedWeight
from embedge.export.graph.values import FloatArray, Value, owner
from embedge.export.weights.tensors import Weights

DOMAIN, VERSION = "embedge", 1  # of embedge's functions, see fused_ops.py
CONTRIB = "com.microsoft"
_INTEGER_MATMULS = ("MatMulIntegerToFloat", "MatMulIntegerToFloatBranch")  # the second is embedge's
_OPERANDS = 4  # of both: what is multiplied, and its scales

T = TypeVar("T")


@dataclass
class OpBuilder:
    """The nodes of a graph under construction, and what they read.

    Attributes:
        weights: where parameters are read from.
        backbone: where the weights of Linears are, which all tasks share, in the layout "shared"; ``None``: each
            task's graph has its own.
        nodes: in the order in which they run; those of branches lie in their ``If``.
        inputs: declared by :meth:`input`.
        outputs: declared by :meth:`output`.
        initializers: tensors made when they are written, by the name of the first that is made together.
        constants: small tensors that are there already, by name.
        unpacked: by Linear, weights that the runtime makes from stored 4-bit ones.
        task_tensors: with a backbone, what differs by task: inputs of the graph, by the name of the first.
    """

    weights: Weights
    backbone: Weights | None = field(default=None, kw_only=True)
    nodes: list[NodeProto] = field(default_factory=list, kw_only=True)
    inputs: list[ValueInfoProto] = field(default_factory=list, kw_only=True)
    outputs: list[ValueInfoProto] = field(default_factory=list, kw_only=True)
    initializers: dict[str, LazyInitializer] = field(default_factory=dict, kw_only=True)
    constants: dict[str, TensorProto] = field(default_factory=dict, kw_only=True)
    unpacked: dict[str, UnpackedWeight] = field(default_factory=dict, kw_only=True)
    task_tensors: dict[str, LazyInitializer] = field(default_factory=dict, kw_only=True)
    _constant_names: dict[tuple[str, tuple[int, ...], bytes], Value] = field(
        default_factory=dict, kw_only=True
    )
    _shared: dict[str, Any] = field(default_factory=dict, kw_only=True)
    _counter: int = field(default=0, kw_only=True)

    # -- values ---------------------------------------------------------------------------------

    def input(self, name: str, elem_type: int, shape: Sequence[int | str]) -> Value:
        """Declare a graph input."""
        self.inputs.append(helper.make_tensor_value_info(name, elem_type, list(shape)))
        return Value(name)

    def output(self, value: str, name: str, elem_type: int, shape: Sequence[int | str]) -> None:
        """Declare ``value`` as the graph output ``name``."""
        self.nodes.append(helper.make_node("Identity", [value], [name], name=f"output/{name}"))
        self.outputs.append(helper.make_tensor_value_info(name, elem_type, list(shape)))

    def const(self, value: Any, dtype: Any = np.float32, name: str | None = None) -> Value:
        """A small constant stored in the graph itself; equal unnamed constants are one."""
        array = np.asarray(value, dtype)
        identity = (array.dtype.str, array.shape, array.tobytes())
        if name is None:
            if identity in self._constant_names:
                return self._constant_names[identity]
            name = f"const_{len(self.constants)}"
            self._constant_names[identity] = Value(name)
        self.constants[name] = numpy_helper.from_array(array, name)
        return Value(name)

    def op(
        self,
        op_type: str,
        *inputs: str,
        domain: str = "",
        name: str | None = None,
        **attributes: Any,
    ) -> Value:
        """Append a node with one output and return the output."""
        return self.op_n(op_type, 1, *inputs, domain=domain, name=name, **attributes)[0]

    def op_n(
        self,
        op_type: str,
        count: int,
        *inputs: str,
        domain: str = "",
        name: str | None = None,
        **attributes: Any,
    ) -> list[Value]:
        """Append a node with ``count`` outputs and return them."""
        self._counter += 1
        name = name or f"{op_type}_{self._counter}"
        outputs = [Value(f"{name}:{i}" if count > 1 else f"{name}:out") for i in range(count)]
        node = helper.make_node(op_type, inputs, outputs, name=name, domain=domain, **attributes)
        self.nodes.append(node)
        for output in outputs:
            output.node = node
        return outputs

    def once(self, key: str, write: Callable[[], T]) -> T:
        """A value, or several, that several layers read: written where it is first asked for.

        Args:
            key: what it is.
            write: writes its nodes.
        """
        if key not in self._shared:
            self._shared[key] = write()
        found: T = self._shared[key]
        return found

    def add(self, a: Value, b: str | None) -> Value:
        """``a + b``; ``a`` itself where ``b`` is ``None``. An integer matmul takes what is added to it."""
        return a if b is None else self._combined("Add", a, b)

    def subtract(self, a: Value, b: str) -> Value:
        """``a - b``, as :meth:`add`."""
        return self._combined("Sub", a, b)

    def _combined(self, op_type: str, a: Value, b: str) -> Value:
        if a.node is None or a.node.op_type not in _INTEGER_MATMULS:
            return self.op(op_type, a, b)
        matmul = self.take_back(a)
        arguments = [*matmul.input[:_OPERANDS], b, *matmul.input[_OPERANDS:]]
        y = self.op(f"{matmul.op_type}{op_type}", *arguments, domain=DOMAIN)
        self.nodes[-1].name = matmul.name  # the Linear's
        return y

    def take_back(self, value: Value) -> NodeProto:
        """Remove the node of a value that nothing has read, for a function's call to take its place."""
        place = max(i for i, node in enumerate(self.nodes) if node is value.node)
        assert not any(value in names_read(node) for node in self.nodes[place + 1 :]), value
        return self.nodes.pop(place)

    def choose(
        self,
        condition: str,
        then: Callable[[], str],
        otherwise: Callable[[], str],
        elem_type: int = TensorProto.FLOAT,
    ) -> Value:
        """The value of ``then`` or of ``otherwise``, of which only that one's nodes run (``If``).

        Args:
            condition: bool scalar.
            then: writes the nodes of one branch and returns the name of its value.
            otherwise: the same for the other.
            elem_type: ONNX element type of both values.
        """
        branches = {}
        for branch, write in (("then_branch", then), ("else_branch", otherwise)):
            outer, self.nodes = self.nodes, []
            shared, self._shared = self._shared, dict(self._shared)
            try:
                value = write()
                inner = self.nodes
            finally:  # what was made inside cannot be read outside
                self.nodes, self._shared = outer, shared
            output = helper.make_tensor_value_info(value, elem_type, None)
            branches[branch] = helper.make_graph(inner, f"{branch}_{self._counter}", [], [output])
        return self.op("If", condition, **branches)

    # -- parameters -----------------------------------------------------------------------------

    @property
    def stored(self) -> Weights:
        """The tensors that the weights of Linears are made of: the backbone's where tasks share them."""
        return self.weights if self.backbone is None else self.backbone

    def initializer(self, initializer: LazyInitializer, *, by_task: bool = False) -> list[Value]:
        """Register an initializer once and return the names of its tensors.

        Args:
            initializer: makes them.
            by_task: adapters change them, so that they are inputs where tasks share a graph.
        """
        shared = self.backbone is not None
        place = self.task_tensors if shared and by_task else self.initializers
        place.setdefault(initializer.specs[0].name, initializer)
        return [Value(spec.name) for spec in initializer.specs]

    def computed(
        self,
        name: str,
        shape: tuple[int, ...],
        compute: Callable[[], FloatArray],
        *sources: str,
        detail: str = "",
        owned_by: str | None = None,
        key: str | None = None,
        by_task: bool = False,
    ) -> Value:
        """A float32 initializer made from other tensors; ``sources`` and ``detail``, or ``key``, identify it.

        ``by_task`` is that of :meth:`initializer`.
        """
        versions = ",".join(f"{s}@{self.weights.version(s)}" for s in sources)
        initializer = LazyInitializer(
            key=key or f"{name}|{versions}|{detail}",
            owner=owned_by or owner(self.weights, *sources),
            specs=(TensorSpec(name=name, elem_type=TensorProto.FLOAT, shape=shape),),
            compute=lambda: [np.asarray(compute(), np.float32)],
        )
        return self.initializer(initializer, by_task=by_task)[0]

    def param(self, name: str, *, by_task: bool = False) -> Value:
        """The tensor ``name`` as a float32 initializer of the same name; ``by_task`` as in :meth:`initializer`."""
        shape = self.weights.shape(name)
        return self.computed(name, shape, lambda: self.weights.read(name), name, by_task=by_task)

    # -- finishing ------------------------------------------------------------------------------

    def prune(self) -> None:
        """Drop nodes, constants and initializers that no output needs."""
        needed = {o.name for o in self.outputs}
        kept: list[NodeProto] = []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                kept.append(node)
                needed.update(names_read(node))
        self.nodes = kept[::-1]
        self.constants = {n: c for n, c in self.constants.items() if n in needed}
        for made in (self.initializers, self.task_tensors):
            unread = [n for n, i in made.items() if needed.isdisjoint(s.name for s in i.specs)]
            for name in unread:
                del made[name]
        self.unpacked = {n: u for n, u in self.unpacked.items() if u.specs[0].name in needed}


def names_read(node: NodeProto) -> set[str]:
    """Values that a node reads, those of its branches and what is made there included."""
    names = {name for name in node.input if name}
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            names |= {output.name for output in attribute.g.output}
            for inner in attribute.g.node:
                names |= names_read(inner)
    return names
