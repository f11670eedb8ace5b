"""Inputs that a norm makes: shifted and smoothed at int4 as at int8, and what GPTQ is told of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from embedge.export.calibration.statistics import InputStatistics
from embedge.export.graph.builder import Graph
from embedge.export.graph.onnx_model import to_model
from embedge.export.graph.scheme import RoundingScheme, Scheme
from embedge.export.graph.values import LinearGroup, LinearRef, Value
from embedge.export.schemes.int4 import Int4Scheme
from embedge.export.schemes.int4_unpacked import Int4UnpackedScheme
from embedge.export.schemes.int8 import Int8Scheme
from embedge.export.schemes.smoothing_constants import SmoothingConstants
from tests.helpers.sessions import open_graph
from tests.helpers.weights import StoredWeights

FloatArray = NDArray[np.float32]
WIDTH, OUT = 64, 32


Constants = Mapping[tuple[str, ...], SmoothingConstants]


def constants(shift: FloatArray, smooth: FloatArray) -> Constants:
    """Those of the Linear's input."""
    return {("linear",): SmoothingConstants(shift=shift, smooth=smooth)}


class Block:
    """A norm with large biases, a Linear behind it, and a residual beside that."""

    def __init__(self) -> None:
        draw = np.random.default_rng(3)
        self.x = draw.normal(size=(40, WIDTH)).astype(np.float32)
        self.tensors = {
            "norm.weight": draw.uniform(0.5, 2, WIDTH).astype(np.float32),
            "norm.bias": (12 * draw.normal(size=WIDTH)).astype(np.float32),
            "linear.weight": draw.normal(size=(OUT, WIDTH)).astype(np.float32),
            "linear.bias": draw.normal(size=OUT).astype(np.float32),
        }
        normal = (self.x - self.x.mean(1, keepdims=True)) / self.x.std(1, keepdims=True)
        self.normal: FloatArray = normal * self.tensors["norm.weight"] + self.tensors["norm.bias"]
        self.shift: FloatArray = self.normal.mean(axis=0)
        self.smooth: FloatArray = draw.uniform(0.5, 2, WIDTH).astype(np.float32)
        self.constants = constants(self.shift, self.smooth)

    def exact(self) -> FloatArray:
        """The Linear's outputs, float32 ``[rows, OUT]``."""
        result: FloatArray = self.normal @ self.tensors["linear.weight"].T
        return result + self.tensors["linear.bias"]

    def graph(self, scheme: Scheme) -> Graph:
        """The Linear and its bias."""
        g = Graph(weights=StoredWeights(self.tensors), scheme=scheme)
        x = g.input("x", TensorProto.FLOAT, ["batch", "tokens", WIDTH])
        (y,) = g.linears(g.norm(x, "norm.weight", "norm.bias", 1e-12), [LinearRef("linear")])
        g.output(g.add(y, g.bias(y)), "out", TensorProto.FLOAT, [])
        return g

    def error(self, scheme: Scheme) -> float:
        """How far a precision's outputs are from :meth:`exact`, root mean square."""
        g = self.graph(scheme)
        g.prune()
        g.outputs[0].type.tensor_type.ClearField("shape")
        tensors = [
            numpy_helper.from_array(array, spec.name)
            for initializer in g.initializers.values()
            for spec, array in zip(initializer.specs, initializer.compute(), strict=True)
        ]
        session = open_graph(to_model(g, tensors, "g", {}))
        (found,) = session.run(None, {"x": self.x[None]})
        return float(np.sqrt(np.square(found[0] - self.exact()).mean()))


def test_what_all_tokens_share_is_not_rounded_at_int4() -> None:
    block = Block()
    plain = block.error(Int4Scheme(32, "rtn", 4))
    shifted = block.error(Int4Scheme(32, "rtn", 4, norms=block.constants))
    assert 0 < shifted < 0.4 * plain


def test_the_residual_carries_the_bias_where_linears_read_another_norm() -> None:
    block = Block()
    for norms, carried in ((None, False), (block.constants, True)):
        g = Graph(
            weights=StoredWeights(block.tensors | {"other": np.ones(WIDTH, np.float32)}),
            scheme=Int4Scheme(32, "rtn", 4, norms=norms),
        )
        x = g.norm(
            g.input("x", TensorProto.FLOAT, ["batch", "tokens", WIDTH]),
            "norm.weight",
            "norm.bias",
            1e-12,
        )
        found = g.scheme.shifted_norm(g, x, g.param("other"))
        assert (found is not None) is carried
    (sum_of,) = [i for name, i in g.initializers.items() if name == "norm.bias+other"]
    assert np.allclose(sum_of.compute()[0], block.tensors["norm.bias"] + 1)


def scheme_of(precision: str, block: Block) -> RoundingScheme:
    """A scheme that smooths the block's input."""
    if precision == "int8":
        return Int8Scheme(block.constants)
    return Int4Scheme(32, "gptq", 4, norms=block.constants)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_gptq_is_told_of_inputs_less_their_shift(precision: str, tmp_path: Path) -> None:
    block = Block()
    group = LinearGroup(value=Value("x"), linears=(LinearRef("linear"),))
    scheme = scheme_of(precision, block)
    statistics = InputStatistics(group, WIDTH, tmp_path)
    for rows in np.split(block.normal, 4):
        statistics.add(rows)
    statistics.finish()
    shift = scheme.input_shift(group)
    assert shift is not None and statistics.hessian is not None
    statistics.shift(shift)
    g = Graph(weights=StoredWeights(block.tensors), scheme=Int4Scheme(32, "gptq", 4))
    scheme.smooth_hessian(g, group, statistics.hessian)
    seen = (block.normal - block.shift) / block.smooth
    expected = seen.T @ seen
    assert np.allclose(statistics.hessian, expected, atol=1e-3 * np.abs(expected).max())


def test_unpacked_weights_get_the_smoothing_that_the_stored_ones_lack() -> None:
    block = Block()
    half = Int4Scheme(
        32, "rtn", 4, norms=constants(block.shift, np.divide(block.smooth, 2, dtype=np.float32))
    )
    for int4, lacks in ((Int4Scheme(32, "rtn", 4), block.smooth), (half, np.full(WIDTH, 2))):
        columns = block.graph(Int4UnpackedScheme(block.constants, int4)).unpacked["linear"].columns
        assert columns is not None
        assert np.allclose(columns.compute()[0], lacks, rtol=1e-6)


def test_rounding_alone_leaves_a_weight_exact_along_the_shift() -> None:
    """The search for a budget's layers runs it on inputs that are not shifted."""
    block = Block()
    group = LinearGroup(value=Value("x"), linears=(LinearRef("linear"),))
    weight = block.tensors["linear.weight"]
    found = Int4Scheme(32, "rtn", 4, norms=block.constants).restored(group, weight.copy())
    assert np.allclose(block.shift @ found, weight @ block.shift, rtol=1e-4, atol=1e-3)
    plain = Int4Scheme(32, "rtn", 4).restored(group, weight.copy())
    errors = [np.square(block.normal @ (w - weight.T)).mean() for w in (found, plain)]
    assert errors[0] < 0.2 * errors[1]


def test_other_constants_are_another_stored_weight() -> None:
    block, group = Block(), LinearGroup(value=Value("x"), linears=(LinearRef("linear"),))
    other = constants(block.shift + 1, block.smooth)
    choices: tuple[Constants | None, ...] = (None, block.constants, other)
    keys = []
    for norms in choices:
        scheme = Int4Scheme(32, "gptq", 4, norms=norms)
        g = block.graph(scheme)
        keys.append(scheme.weight(g, group, LinearRef("linear")).key)
    assert len(set(keys)) == 3
