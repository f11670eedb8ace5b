"""Graphs under construction: what is written for what, and what takes the place of what."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from embedge.export.graph.architecture import Attention, Span
from embedge.export.graph.attention import Seen, attention
from embedge.export.graph.builder import Graph
from embedge.export.graph.ops import CONTRIB, DOMAIN, OpBuilder
from embedge.export.graph.values import LinearRef, Value
from embedge.export.schemes.int8 import Int8Scheme
from tests.helpers.weights import StoredWeights

DRAW = np.random.default_rng(3)


def integer_matmul(g: OpBuilder, name: str) -> Value:
    """A matmul of uint8 ``a`` with a weight of its own."""
    weight = g.const(DRAW.integers(-127, 128, (64, 48)), np.int8)
    arguments = ["a", weight, "a_scale", g.const(DRAW.normal(size=48)), g.const(128, np.uint8)]
    return g.op("MatMulIntegerToFloat", *arguments, domain=CONTRIB, name=name)


def built(g: OpBuilder) -> list[str]:
    """The operators of a graph."""
    return [n.op_type for n in g.nodes]


def test_an_integer_matmul_takes_what_is_added_to_it_once() -> None:
    g = OpBuilder(StoredWeights())
    y = g.add(integer_matmul(g, "p"), "bias")
    g.add(y, "residual")
    g.subtract(integer_matmul(g, "q"), "bias")
    assert built(g) == ["MatMulIntegerToFloatAdd", "Add", "MatMulIntegerToFloatSub"]
    assert [n.name for n in g.nodes][::2] == ["p", "q"]


def test_an_integer_matmul_that_is_multiplied_or_subtracted_stays() -> None:
    g = OpBuilder(StoredWeights())
    g.op("Mul", integer_matmul(g, "p"), "other")
    g.subtract(Value("other"), integer_matmul(g, "q"))
    assert built(g) == ["MatMulIntegerToFloat", "Mul", "MatMulIntegerToFloat", "Sub"]


def test_of_two_integer_matmuls_the_sum_takes_one() -> None:
    g = OpBuilder(StoredWeights())
    p, q = integer_matmul(g, "p"), integer_matmul(g, "q")
    g.add(g.add(p, q), "rest")
    assert built(g) == ["MatMulIntegerToFloat", "MatMulIntegerToFloatAdd", "Add"]
    assert [n.name for n in g.nodes][:2] == ["q", "p"]
    assert g.nodes[1].input[4] == q


def test_a_node_that_another_reads_cannot_be_taken_back() -> None:
    g = OpBuilder(StoredWeights())
    p = integer_matmul(g, "p")
    g.op("Mul", p, "other")
    with pytest.raises(AssertionError):
        g.add(p, "bias")


def test_attention_is_a_function_but_between_branches() -> None:
    g = Graph(StoredWeights(), Int8Scheme({}))
    *linears, out = (LinearRef(name) for name in "qkvo")
    whole = Attention(linears=linears, out=out, heads=2, kv_heads=2, head_size=8)
    padded, flash = Seen(lengths="lengths"), Seen(lengths="lengths", flash="flash")
    for seen in (padded, flash, Seen(mask="mask"), Seen()):
        attention(g, whole, seen, "q", "k", "v")
    causal = replace(whole, span=Span(causal=True))
    attention(g, causal, Seen(tokens="tokens"), "q", "k", "v")
    called = [n.op_type for n in g.nodes if n.domain == DOMAIN]
    assert called == ["PaddedAttention", "FullAttention", "CausalAttention"]
    assert [t for t in built(g) if t in ("If", "Attention")] == ["If", "Attention"]
