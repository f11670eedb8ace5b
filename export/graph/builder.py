"""Writing an ONNX graph node by node, with weights as lazy initializers.

The graph of a task is written by the model's family (``families/``) against this class. Families say
what is computed; how a Linear or an embedding table is stored and run is the precision's business
(``_forms.py``). No weight is read here: a :class:`LazyInitializer` knows how to make its tensors when their
bytes are wanted, and is dropped right after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from embedge.export.weights.tensors import BASE, Weights

if TYPE_CHECKING:
    from embedge.export.graph.scheme import Scheme
    from embedge.export.schemes.int4_unpacked import Unpacked

OPSET = 24  # Attention's nonpad_kv_seqlen: right padding without a tokens × tokens mask
# ONNX Runtime takes a kernel without an end version for the version of its schema alone. Up to 20
# the CUDA provider has one for every operator used here; Identity lacks it from 21, Cos and Sin
# from 22, Cast, Shape and Reshape at 24 (tests/export/cuda_kernels.tsv).
CUDA_OPSET = 20
IR_VERSION = 11
CONTRIB = "com.microsoft"

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Name, ONNX element type and shape of an initializer that is not computed yet."""

    name: str
    elem_type: int
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        dtype = helper.tensor_dtype_to_np_dtype(self.elem_type)
        return int(np.prod(self.shape, dtype=np.int64)) * dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class LazyInitializer:
    """Initializers that are computed together, when their bytes are written.

    Attributes:
        key: identity of the result: two initializers of one precision with equal keys make equal bytes.
        specs: the initializers, in the order in which ``compute`` returns them.
        compute: makes the arrays; called at most once per export of a key.
        owner: the task whose adapter changes a source of the result, or ``"base"``: shared by all.
        describe: for the per-layer report: format and error; ``None`` for plain tensors.
    """

    key: str
    owner: str
    specs: tuple[TensorSpec, ...]
    compute: Callable[[], Sequence[Array]]
    describe: Callable[[Sequence[Array]], dict[str, Any]] | None = None

    @property
    def elements(self) -> int:
        """Elements of the largest initializer, a measure of what computing takes."""
        return max(int(np.prod(spec.shape, dtype=np.int64)) for spec in self.specs)


@dataclass(frozen=True)
class LinearRef:
    """A Linear by its canonical name, or some of its output rows (fused projections)."""

    name: str
    start: int | None = None
    stop: int | None = None

    @property
    def label(self) -> str:
        return self.name if self.start is None else f"{self.name}[{self.start}:{self.stop}]"


@dataclass(frozen=True, kw_only=True)
class ScaleSink:
    """A Linear whose output channels scale the input of another one linearly.

    Attributes:
        lin: the producer (value projection, up projection).
        groups: ``(kv_heads, queries_per_kv_head, head_size)`` where each of its channels feeds several
            input channels (grouped-query attention), else ``None``: one to one.
        gated: whether the input is the producer's output times other values (a gated MLP).
    """

    lin: LinearRef
    groups: tuple[int, int, int] | None = None
    gated: bool = False


@dataclass(frozen=True, kw_only=True)
class Norm:
    """Where a normalized value came from, so that a consumer can ask for it with other parameters."""

    source: str
    weight: str
    bias: str | None
    epsilon: float
    rms: bool


@dataclass(frozen=True, kw_only=True)
class LinearGroup:
    """The shared input of some Linears.

    Attributes:
        value: its name in the graph.
        lins: the Linears that read it.
        sink: what a per-channel scale of it may be folded into.
        lower_bound: a value it is never below, or ``None``.
        norm: the norm that made it, or ``None``.
        rows: names the order of its rows, where a graph has several.
        multiplied: the Linear whose product nothing reads but a multiplication, or ``None``.
    """

    value: str
    lins: tuple[LinearRef, ...]
    sink: ScaleSink | None = None
    lower_bound: float | None = None
    norm: Norm | None = None
    rows: str = ""
    multiplied: LinearRef | None = None

    @property
    def label(self) -> str:
        """The name of the input: that of its first Linear."""
        return self.lins[0].label

    @property
    def gated(self) -> bool:
        """See :attr:`ScaleSink.gated`."""
        return self.sink is not None and self.sink.gated


@dataclass
class Graph:
    """A graph under construction.

    Attributes:
        weights: where parameters are read from.
        scheme: how Linears and tables are stored and run.
        linear_groups: input value of every Linear group, by the label of its first Linear.
        tables: names of the embedding tables.
        norms: normalized values and what made them.
        input_shift: by Linear, the constant float32 ``[in]`` that was subtracted from its input.
        output_scale: by Linear, the float32 ``[out]`` by which its weight's rows were multiplied.
        pending_row_scales: by value, float32 ``[batch, tokens, 1]`` by which it has still to be multiplied.
        unpacked: by Linear, weights that the runtime makes from stored 4-bit ones.
        shared: values that several layers read, by a name for what they are.
    """

    weights: Weights
    scheme: Scheme
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    initializers: dict[str, LazyInitializer] = field(default_factory=dict)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)
    linear_groups: dict[str, LinearGroup] = field(default_factory=dict)
    tables: list[str] = field(default_factory=list)
    norms: dict[str, Norm] = field(default_factory=dict)
    input_shift: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    output_scale: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    pending_row_scales: dict[str, str] = field(default_factory=dict)
    unpacked: dict[str, Unpacked] = field(default_factory=dict)
    _constant_names: dict[tuple[str, tuple[int, ...], bytes], str] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    _counter: int = 0

    # -- values ---------------------------------------------------------------------------------

    def input(self, name: str, elem_type: int, shape: Sequence[int | str]) -> str:
        """Declare a graph input and return its name."""
        self.inputs.append(helper.make_tensor_value_info(name, elem_type, list(shape)))
        return name

    def output(self, value: str, name: str, elem_type: int, shape: Sequence[int | str]) -> None:
        """Declare ``value`` as the graph output ``name``."""
        self.nodes.append(helper.make_node("Identity", [value], [name], name=f"output/{name}"))
        self.outputs.append(helper.make_tensor_value_info(name, elem_type, list(shape)))

    def const(self, value: Any, dtype: Any = np.float32, name: str | None = None) -> str:
        """A small constant stored in the graph itself; equal unnamed constants are one."""
        array = np.asarray(value, dtype)
        identity = (array.dtype.str, array.shape, array.tobytes())
        if name is None:
            if identity in self._constant_names:
                return self._constant_names[identity]
            name = f"const_{len(self.constants)}"
            self._constant_names[identity] = name
        self.constants[name] = numpy_helper.from_array(array, name)
        return name

    def op(
        self,
        op_type: str,
        *inputs: str,
        domain: str = "",
        name: str | None = None,
        **attributes: Any,
    ) -> str:
        """Append a node with one output and return the output's name."""
        return self.op_n(op_type, 1, *inputs, domain=domain, name=name, **attributes)[0]

    def op_n(
        self,
        op_type: str,
        count: int,
        *inputs: str,
        domain: str = "",
        name: str | None = None,
        **attributes: Any,
    ) -> list[str]:
        """Append a node with ``count`` outputs and return their names."""
        self._counter += 1
        name = name or f"{op_type}_{self._counter}"
        outputs = [f"{name}:{i}" if count > 1 else f"{name}:out" for i in range(count)]
        self.nodes.append(
            helper.make_node(op_type, list(inputs), outputs, name=name, domain=domain, **attributes)
        )
        return outputs

    def choose(
        self,
        condition: str,
        then: Callable[[], str],
        otherwise: Callable[[], str],
        elem_type: int = TensorProto.FLOAT,
    ) -> str:
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
            shared, self.shared = self.shared, dict(self.shared)
            try:
                value = write()
                inner = self.nodes
            finally:  # what was made inside cannot be read outside
                self.nodes, self.shared = outer, shared
            output = helper.make_tensor_value_info(value, elem_type, None)
            branches[branch] = helper.make_graph(inner, f"{branch}_{self._counter}", [], [output])
        return self.op("If", condition, **branches)

    # -- parameters -----------------------------------------------------------------------------

    def initializer(self, initializer: LazyInitializer) -> list[str]:
        """Register a initializer once and return the names of its initializers."""
        self.initializers.setdefault(initializer.specs[0].name, initializer)
        return [spec.name for spec in initializer.specs]

    def computed(
        self,
        name: str,
        shape: tuple[int, ...],
        compute: Callable[[], NDArray[np.float32]],
        *sources: str,
        detail: str = "",
        owner: str | None = None,
    ) -> str:
        """A float32 initializer made from other tensors; ``sources`` and ``detail`` identify it."""
        versions = ",".join(f"{s}@{self.weights.version(s)}" for s in sources)
        owner = owner or self.owner(*sources)
        spec = TensorSpec(name=name, elem_type=TensorProto.FLOAT, shape=shape)
        initializer = LazyInitializer(
            key=f"{name}|{versions}|{detail}",
            owner=owner,
            specs=(spec,),
            compute=lambda: [np.asarray(compute(), np.float32)],
        )
        return self.initializer(initializer)[0]

    def owner(self, *sources: str) -> str:
        """The task whose adapter changes one of the tensors, or ``"base"``."""
        versions = {self.weights.version(s) for s in sources} - {BASE}
        return versions.pop() if versions else BASE

    def param(self, name: str) -> str:
        """The tensor ``name`` as a float32 initializer of the same name."""
        return self.computed(name, self.weights.shape(name), lambda: self.weights.read(name), name)

    # -- what families compute with ---------------------------------------------------------------

    def linears(
        self,
        x: str,
        lins: Sequence[LinearRef],
        *,
        sink: ScaleSink | None = None,
        lower_bound: float | None = None,
        rows: str = "",
        multiplied: LinearRef | None = None,
    ) -> list[str]:
        """Products of ``x`` ``[batch, tokens, in]`` with each Linear's weight, without biases.

        Args:
            x: the shared input.
            lins: the Linears that read it.
            sink: what a per-channel scale of ``x`` may be folded into.
            lower_bound: a value that no element of ``x`` is ever below, where one is known.
            rows: names ``batch`` and ``tokens``, where a graph has values of several.
            multiplied: see :meth:`gated`.
        """
        group = LinearGroup(
            value=x,
            lins=tuple(lins),
            sink=sink,
            lower_bound=lower_bound,
            norm=self.norms.get(x),
            rows=rows,
            multiplied=multiplied,
        )
        if x in self.pending_row_scales and not self.scheme.scales_rows(group):
            group = replace(group, value=self.op("Mul", x, self.pending_row_scales[x]))
        self.linear_groups[group.label] = group
        return self.scheme.linears(self, group)

    def gated(self, x: str, gate: LinearRef, up: LinearRef, kind: str) -> str:
        """``activation(gate(x)) · up(x)``, what the last Linear of a gated MLP reads.

        Args:
            x: its input ``[batch, tokens, in]``.
            gate: the Linear behind the activation.
            up: the other one.
            kind: the activation, see :meth:`activation`.
        """
        a, b = self.linears(x, [gate, up], multiplied=up)
        y = self.op("Mul", self.activation(a, kind, gate), self.add(b, self.bias(up)))
        if b in self.pending_row_scales:
            self.pending_row_scales[y] = self.pending_row_scales[b]
        return y

    def bias(
        self, lin: LinearRef, *, upstream_bias: LinearRef | None = None, negated: bool = False
    ) -> str | None:
        """The bias that completes :meth:`linears`: the Linear's own and what was folded into it.

        Args:
            lin: the Linear.
            upstream_bias: a Linear whose bias reaches ``lin``'s input unchanged and was left out there (the
                value projection: rows of softmax sum to 1, so its bias passes attention as it is).
            negated: return minus the bias.

        Returns:
            Name of a float32 ``[out]`` initializer, or ``None`` where there is nothing to add.
        """
        return self.scheme.bias(self, lin, upstream_bias, negated)

    def drop_bias(self, lin: LinearRef) -> None:
        """State that a Linear's bias changes nothing here, so that it does not count as overlooked."""
        name = f"{lin.name}.bias"
        if self.weights.has(name):
            self.weights.version(name)

    def embedding(self, name: str, ids: str) -> str:
        """Rows of the table ``name`` for int64 ``ids`` of any shape, float32."""
        self.tables.append(name)
        return self.scheme.embedding(self, name, ids)

    def add(self, a: str, b: str | None) -> str:
        """``a + b``; ``a`` itself where ``b`` is ``None``."""
        return a if b is None else self.op("Add", a, b)

    def norm(
        self, x: str, weight: str, bias: str | None, epsilon: float, *, rms: bool = False
    ) -> str:
        """LayerNorm, or RMSNorm with ``rms``, over the last axis."""
        gamma = self.param(weight)
        if rms:
            y = self.rms_norm(x, gamma, epsilon)
        else:
            beta = [self.param(bias)] if bias else []
            y = self.op("LayerNormalization", x, gamma, *beta, axis=-1, epsilon=epsilon)
        self.norms[y] = Norm(source=x, weight=weight, bias=bias, epsilon=epsilon, rms=rms)
        return y

    def rms_norm(self, x: str, gamma: str, epsilon: float) -> str:
        """RMSNorm over the last axis; ONNX has it from version 23, ONNX Runtime had it before."""
        kind = "SimplifiedLayerNormalization" if self.scheme.cuda else "RMSNormalization"
        return self.op(kind, x, gamma, axis=-1, epsilon=epsilon)

    def rotary(self, x: str, cos: str, sin: str, positions: str | None, heads: int) -> str:
        """Rotary embedding of ``x`` float32 ``[batch, tokens, heads · head_size]``, halves rotated.

        Args:
            x: queries or keys.
            cos: float32 ``[positions, head_size / 2]``, or without ``positions`` a row for every token,
                ``[batch, tokens, head_size / 2]``.
            sin: as ``cos``.
            positions: int64 ``[batch, tokens]``, or ``None``.
            heads: heads of ``x``.
        """
        if not self.scheme.cuda:
            tables = [cos, sin] if positions is None else [cos, sin, positions]
            return self.op("RotaryEmbedding", x, *tables, num_heads=heads, interleaved=0)
        if positions is None:
            cos, sin, positions = self._rotary_rows(cos, sin)
        arguments = [x, positions, cos, sin]
        return self.op(
            "RotaryEmbedding", *arguments, domain=CONTRIB, num_heads=heads, interleaved=0
        )

    def _rotary_rows(self, cos: str, sin: str) -> tuple[str, str, str]:
        """A row for every token as tables, whose rows ONNX Runtime's own operator wants, and positions."""
        if f"rows.{cos}" not in self.shared:
            axes = self.op("Shape", cos)
            row = self.op("Gather", axes, self.const([2], "int64"), axis=0)
            table = self.op("Concat", self.const([-1], "int64"), row, axis=0)
            zero, one = self.const(0, "int64"), self.const(1, "int64")
            places = self.op("Shape", cos, start=0, end=2)
            count = self.op("Mul", *(self.op("Gather", axes, i, axis=0) for i in (zero, one)))
            steps = self.op("Range", zero, count, one)
            self.shared[f"rows.{cos}"] = self.op("Reshape", cos, table)
            self.shared[f"rows.{sin}"] = self.op("Reshape", sin, table)
            self.shared[f"places.{cos}"] = self.op("Reshape", steps, places)
        rows = self.shared[f"rows.{cos}"], self.shared[f"rows.{sin}"]
        return *rows, self.shared[f"places.{cos}"]

    def add_norm(
        self,
        x: str,
        residual: str,
        weight: str,
        bias: str | None,
        epsilon: float,
        *,
        rms: bool = False,
        linear_bias: str | None = None,
    ) -> tuple[str, str]:
        """``total = x + residual (+ linear_bias)`` and its norm.

        Returns:
            ``(normalized, total)``.
        """
        if linear_bias is not None:
            shifted = self.scheme.shifted_norm(self, residual, linear_bias)
            if shifted is None:
                x = self.op("Add", x, linear_bias)
            else:
                residual = shifted
        total = self.op("Add", x, residual)
        return self.norm(total, weight, bias, epsilon, rms=rms), total

    def activation(self, x: str, kind: str, lin: LinearRef) -> str:
        """An activation by its transformers name, after adding the bias of ``lin``."""
        if kind == "gelu":
            # Subtracting the negated bias keeps ONNX Runtime from fusing BiasGelu, whose CPU kernel
            # takes twice the time of the two (measured; bench/LOG.md).
            bias = self.bias(lin, negated=True)
            x = x if bias is None else self.op("Sub", x, bias)
            return self.op("Gelu", x, domain=CONTRIB)
        x = self.add(x, self.bias(lin))
        if kind in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"):
            return self.op("FastGelu", x, domain=CONTRIB)
        if kind in ("silu", "swish"):
            return self.op("QuickGelu", x, domain=CONTRIB, alpha=1.0)
        if kind == "relu":
            return self.op("Relu", x)
        raise AssertionError(f"families check activations; got {kind!r}")

    # -- finishing ----------------------------------------------------------------------------------

    def prune(self) -> None:
        """Drop nodes, constants and initializers that no output needs."""
        needed = {o.name for o in self.outputs}
        kept: list[onnx.NodeProto] = []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                kept.append(node)
                needed.update(names_read(node))
        self.nodes = kept[::-1]
        self.constants = {n: c for n, c in self.constants.items() if n in needed}
        self.initializers = {
            n: r
            for n, r in self.initializers.items()
            if needed.intersection(s.name for s in r.specs)
        }
        self.unpacked = {n: u for n, u in self.unpacked.items() if u.specs[0].name in needed}


def names_read(node: onnx.NodeProto) -> set[str]:
    """Values that a node reads, those of its branches and what is made there included."""
    names = {name for name in node.input if name}
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            names |= {output.name for output in attribute.g.output}
            for inner in attribute.g.node:
                names |= names_read(inner)
    return names
