"""What a graph is written with.

A family declares its layers (``architecture.py``), and ``transformer.py`` writes them with :class:`Graph`.
How a Linear or an embedding table is stored and run is the precision's business (:class:`Scheme`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from embedge.export.graph.initializers import digest
from embedge.export.graph.ops import CONTRIB, OpBuilder
from embedge.export.graph.scheme import Scheme, Target
from embedge.export.graph.values import (
    FloatArray,
    LinearGroup,
    LinearRef,
    Norm,
    ScaleSink,
    Value,
)

GELU_LOWER_BOUND = -0.17004  # the minimum of x·Φ(x) is -0.169971; margin for float rounding


@dataclass
class Graph(OpBuilder):
    """A graph under construction.

    Attributes:
        scheme: how Linears and tables are stored and run.
        linear_groups: what was asked of :meth:`linears`, by the label of an input's first Linear.
        tables: names of the embedding tables.
        states: names of the token states ``[batch, tokens, hidden]`` before the first layer and after each.
    """

    scheme: Scheme
    linear_groups: dict[str, LinearGroup] = field(default_factory=dict, kw_only=True)
    tables: list[str] = field(default_factory=list, kw_only=True)
    states: list[str] = field(default_factory=list, kw_only=True)

    # -- Linears --------------------------------------------------------------------------------

    def linears(
        self,
        x: str,
        linears: Sequence[LinearRef],
        *,
        sink: ScaleSink | None = None,
        rows: str = "",
        multiplied: LinearRef | None = None,
    ) -> list[Value]:
        """Matmuls of ``x`` ``[batch, tokens, in]`` with each Linear's weight, without biases.

        Args:
            x: the shared input.
            linears: the Linears that read it.
            sink: what a per-channel scale of ``x`` may be folded into.
            rows: names ``batch`` and ``tokens``, where a graph has values of several.
            multiplied: see :meth:`gated`.
        """
        value = x if isinstance(x, Value) else Value(x)
        group = LinearGroup(
            value=value,
            linears=tuple(linears),
            sink=sink or value.sink,
            rows=rows,
            multiplied=multiplied,
        )
        if value.row_scale is not None and not self.scheme.scales_rows(group):
            group = replace(group, value=self.op("Mul", value, value.row_scale))
        self.linear_groups[group.label] = group
        matmuls = self.scheme.linears(self, group)
        for matmul, linear in zip(matmuls, group.linears, strict=True):
            matmul.linear = linear
        return matmuls

    def gated(self, x: str, gate: LinearRef, up: LinearRef, kind: str) -> Value:
        """``activation(gate(x)) · up(x)``, what the last Linear of a gated MLP reads.

        Args:
            x: its input ``[batch, tokens, in]``.
            gate: the Linear behind the activation.
            up: the other one.
            kind: the activation, see :meth:`activation`.
        """
        a, b = self.linears(x, [gate, up], multiplied=up)
        factors = self.activation(a, kind), self.add(b, self.bias(b))
        y = self.op("Mul", *factors)
        y.factors, y.sink, y.row_scale = factors, ScaleSink(linear=up), b.row_scale
        return y

    def bias(
        self, matmul: Value, *, upstream: Value | None = None, negated: bool = False
    ) -> Value | None:
        """What completes a matmul of :meth:`linears`: the Linear's bias, and what was folded into it.

        Args:
            matmul: what :meth:`linears` gave.
            upstream: a matmul whose bias reaches the Linear's input unchanged and was left out there (the
                value projection: rows of softmax sum to 1, so its bias passes attention as it is).
            negated: return minus the bias.

        Returns:
            A float32 ``[out]`` initializer, or ``None`` where there is nothing to add.
        """
        weights, chain = self.weights, [p for p in (matmul, upstream) if p is not None]
        linears = [p.linear for p in chain if p.linear is not None]
        if not any(
            weights.has(linear.bias) or p.input_shift is not None
            for p, linear in zip(chain, linears, strict=True)
        ):
            return None
        linear, scale, shift = linears[0], matmul.output_scale, matmul.input_shift
        plain = upstream is None and shift is None and scale is None and not negated
        if plain and linear.start is None:
            return self.param(linear.bias, by_task=True)
        sources = [p.weight for p in linears] + [p.bias for p in linears if weights.has(p.bias)]

        def compute() -> FloatArray:
            constant = shift
            if upstream is not None:
                inner = self._full_bias(linears[1], upstream.input_shift)
                constant = inner if constant is None else constant + inner
            bias = self._full_bias(linear, constant)
            if scale is not None:
                bias = bias * scale
            return -bias if negated else bias

        return self.computed(
            f"{linear.label}.bias" + (".negated" if negated else ""),
            (linear.out_features(weights),),
            compute,
            *sources,
            detail="|".join(digest(a) for a in (*(p.input_shift for p in chain), scale)),
            by_task=True,
        )

    def _full_bias(self, linear: LinearRef, constant: FloatArray | None) -> FloatArray:
        """``bias + W·constant``, float32 ``[out]``: everything that does not depend on the token.

        Args:
            linear: the Linear.
            constant: float32 ``[in]``, the part of the input that its matmul left out, or ``None``.
        """
        bias = linear.read_bias(self.weights).astype("float64")
        if constant is not None:
            bias = bias + linear.read(self.weights).astype("float64") @ constant.astype("float64")
        return bias.astype("float32")

    def drop_bias(self, matmul: Value) -> None:
        """State that a Linear's bias changes nothing here, so that it does not count as overlooked."""
        if matmul.linear is not None and self.weights.has(matmul.linear.bias):
            self.weights.version(matmul.linear.bias)

    # -- what else families compute with --------------------------------------------------------

    def embedding(self, name: str, ids: str) -> Value:
        """Rows of the table ``name`` for int64 ``ids`` of any shape, float32."""
        self.tables.append(name)
        return self.scheme.embedding(self, name, ids)

    def norm(
        self, x: str, weight: str, bias: str | None, epsilon: float, *, rms: bool = False
    ) -> Value:
        """LayerNorm, or RMSNorm with ``rms``, over the last axis."""
        gamma = self.param(weight)
        if rms:
            y = self.rms_norm(x, gamma, epsilon)
        else:
            beta = [self.param(bias)] if bias else []
            y = self.op("LayerNormalization", x, gamma, *beta, axis=-1, epsilon=epsilon)
        y.norm = Norm(source=x, weight=weight, bias=bias, epsilon=epsilon, rms=rms)
        return y

    def rms_norm(self, x: str, gamma: str, epsilon: float) -> Value:
        """RMSNorm over the last axis; ONNX has it from version 23, ONNX Runtime had it before."""
        on_cuda = self.scheme.target is Target.CUDA
        kind = "SimplifiedLayerNormalization" if on_cuda else "RMSNormalization"
        return self.op(kind, x, gamma, axis=-1, epsilon=epsilon)

    def activation(self, matmul: Value, kind: str) -> Value:
        """An activation by its transformers name, of a matmul and its bias."""
        if kind == "gelu":
            # Subtracting the negated bias keeps ONNX Runtime from fusing BiasGelu, whose CPU kernel
            # takes twice the time of the two (measured, lab note 9).
            bias = self.bias(matmul, negated=True)
            x = matmul if bias is None else self.subtract(matmul, bias)
            y = self.op("Gelu", x, domain=CONTRIB)
        else:
            x = self.add(matmul, self.bias(matmul))
            if kind in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"):
                y = self.op("FastGelu", x, domain=CONTRIB)
            elif kind in ("silu", "swish"):
                return self.op("QuickGelu", x, domain=CONTRIB, alpha=1.0)
            elif kind == "relu":
                y = self.op("Relu", x)
            else:
                raise AssertionError(f"families check activations; got {kind!r}")
        y.lower_bound = 0.0 if kind == "relu" else GELU_LOWER_BOUND
        return y
