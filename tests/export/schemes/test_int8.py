"""int8 Linears: smoothing, outlier channels, the gated product's rotation, and what GPTQ is told."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from scipy.special import expit

from embedge.export.calibration.smoothing import rotated_constants
from embedge.export.calibration.statistics import InputStatistics
from embedge.export.graph.builder import Graph
from embedge.export.graph.onnx_model import to_model
from embedge.export.graph.ops import DOMAIN
from embedge.export.graph.scheme import Scheme
from embedge.export.graph.values import LinearGroup, LinearRef, ScaleSink, Value
from embedge.export.schemes.floats import Float32Scheme
from embedge.export.schemes.int8 import Int8Scheme
from embedge.export.schemes.smoothing_constants import SmoothingConstants
from embedge.quant.rotation import block_rotation, rotate_blocks
from tests.helpers.sessions import open_graph
from tests.helpers.weights import StoredWeights


def model_of(g: Graph) -> onnx.ModelProto:
    """A graph with the tensors that its initializers make."""
    for output in g.outputs:
        output.type.tensor_type.ClearField("shape")
    tensors = [
        numpy_helper.from_array(array, spec.name)
        for initializer in g.initializers.values()
        for spec, array in zip(initializer.specs, initializer.compute(), strict=True)
    ]
    return to_model(g, tensors, "g", {})


def gated(factor: float) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Inputs ``[rows, 64]``, of which every tenth has an outlier channel, and weights up and down."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(200, 64)).astype(np.float32)
    up = np.eye(64, dtype=np.float32)
    down = draw.normal(size=(32, 64)).astype(np.float32)
    x[::10, 7] *= factor
    return x, up, down


def gated_input(*factors: Value, value: Value | None = None) -> LinearGroup:
    """What the last Linear of a gated MLP reads."""
    value = value or Value("product")
    value.factors = factors[0], factors[1]
    sink = ScaleSink(linear=LinearRef("up"))
    return LinearGroup(value=value, linears=(LinearRef("down"),), sink=sink)


def matmul_error(factor: float) -> tuple[float, int]:
    """Median error of the rows of an int8 product, relative to what the other channels make of it.

    Also how many channels were set apart.
    """
    x, up, down = gated(factor)
    stored = StoredWeights({"up.weight": up, "down.weight": down})
    group = gated_input(Value("x"), Value("ones"))
    statistics = InputStatistics(group, 64, None)
    statistics.add(x)
    statistics.sample, statistics.matrices = [x.copy()], [down.T.copy()]
    constants = rotated_constants(statistics)
    assert constants.smooth is not None
    scheme = Int8Scheme({("down",): constants})
    g = Graph(weights=stored, scheme=scheme)
    factors = g.const(np.ones(64)), g.input("x", TensorProto.FLOAT, ["batch", "tokens", 64])
    (y,) = scheme.linears(g, gated_input(*factors, value=g.op("Mul", *factors)))
    g.output(y, "out", TensorProto.FLOAT, [])
    session = open_graph(model_of(g))
    # the producer would have divided by the smoothing
    (found,) = session.run(None, {"x": (x / constants.smooth)[None]})
    quiet = x.copy()
    quiet[:, 7] = 0
    errors = np.linalg.norm(found[0] - x @ down.T, axis=1)
    errors /= np.linalg.norm(quiet @ down.T, axis=1)
    return float(np.median(errors[::10])), 0 if constants.outliers is None else len(
        constants.outliers
    )


def test_outlier_channels_are_set_apart_and_cost_the_others_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quiet, none = matmul_error(factor=1)
    assert none == 0
    outlying, one = matmul_error(factor=1000)
    assert one == 1
    assert outlying < 1.5 * quiet
    monkeypatch.setattr("embedge.export.calibration.smoothing.OUTLIER_RATIO", np.inf)
    assert matmul_error(factor=1000)[0] > 3 * outlying


class Rows:
    """A gated MLP of random weights, and what int8 makes of it."""

    def __init__(self, inner: int, *, bias: bool = False) -> None:
        draw = np.random.default_rng(inner)
        self.tensors = {
            "gate.weight": draw.normal(size=(inner, 48)).astype(np.float32),
            "up.weight": draw.normal(size=(inner, 48)).astype(np.float32),
            "down.weight": draw.normal(size=(40, inner)).astype(np.float32),
        }
        if bias:
            self.tensors["up.bias"] = draw.normal(size=inner).astype(np.float32)
        self.inner = inner

    def run(self, x: NDArray[np.float32], scheme: Scheme | None = None) -> NDArray[np.float32]:
        g = Graph(weights=StoredWeights(self.tensors), scheme=scheme or Int8Scheme({}))
        g.input("x", TensorProto.FLOAT, ["batch", "tokens", 48])
        gate, up, down = LinearRef("gate"), LinearRef("up"), LinearRef("down")
        y = g.gated("x", gate, up, "silu")
        (y,) = g.linears(y, [down])
        g.output(y, "out", TensorProto.FLOAT, [])
        self.graph = model_of(g)
        session = open_graph(self.graph)
        result: NDArray[np.float32] = session.run(None, {"x": x[None]})[0][0]
        return result

    def exact(self, x: NDArray[np.float32]) -> NDArray[np.float64]:
        gate, up, down = (
            self.tensors[f"{n}.weight"].astype(np.float64) for n in ("gate", "up", "down")
        )
        a, b = x @ gate.T, x @ up.T + self.tensors.get("up.bias", np.float64(0))
        product: NDArray[np.float64] = (a * expit(a) * b) @ down.T
        return product


def relative(found: NDArray[np.float32], exact: NDArray[np.float64]) -> NDArray[np.float64]:
    """Error of each row relative to its length."""
    error: NDArray[np.float64] = np.linalg.norm(found - exact, axis=1)
    return error / np.linalg.norm(exact, axis=1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("inner", [64, 60, 61])  # blocks of 16, of 15, and of one channel
def test_a_gated_mlp_at_int8_is_close_for_rows_of_any_size(inner: int, bias: bool) -> None:
    mlp = Rows(inner, bias=bias)
    x = np.random.default_rng(1).normal(size=(60, 48)).astype(np.float32)
    x *= np.float32(10) ** np.linspace(-3, 3, 60, dtype=np.float32)[:, None]
    assert relative(mlp.run(x, Float32Scheme()), mlp.exact(x)).max() < 1e-5
    errors = relative(mlp.run(x), mlp.exact(x))
    assert np.median(errors) < 0.02 and errors.max() < 0.05
    sizes = {t.name: tuple(t.dims) for t in mlp.graph.graph.initializer}
    rotations = [name for name, size in sizes.items() if size == block_rotation(inner).shape]
    assert len(rotations) == 1
    assert sizes["down.weight"] == (inner, 40)


def test_the_scale_of_a_product_that_is_multiplied_again_waits_for_the_next() -> None:
    for bias in (False, True):
        mlp = Rows(64, bias=bias)
        mlp.run(np.ones((2, 48), np.float32))
        (up,) = (n for n in mlp.graph.graph.node if n.name == "up")
        constants = {t.name for t in mlp.graph.graph.initializer}
        assert (up.input[2] in constants) is not bias  # the scale per row, or 1


def test_a_row_of_zeros_gives_zeros_and_a_constant_one_no_error() -> None:
    mlp = Rows(64)
    x = np.zeros((3, 48), np.float32)
    x[1] = 1
    result = mlp.run(x)
    assert not result[[0, 2]].any() and np.isfinite(result).all()
    mlp.tensors["gate.weight"][:] = mlp.tensors["gate.weight"][0]  # every product is the same
    mlp.tensors["up.weight"][:] = mlp.tensors["up.weight"][0]
    values = mlp.run(x[1:2])
    down = np.abs(mlp.tensors["down.weight"])
    rounding = (down.max(axis=1) / 127 / 2).sum()  # the weights' own
    assert np.abs(values - mlp.exact(x[1:2])).max() < rounding * np.abs(mlp.exact(x[1:2])).max()


def test_rotated_blocks_err_less_than_rows_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gated product has a few large values in a row."""
    mlp = Rows(512)
    x = np.random.default_rng(2).normal(size=(400, 48)).astype(np.float32)
    rotated = relative(mlp.run(x), mlp.exact(x)).mean()
    monkeypatch.setattr("embedge.export.schemes.int8.input_rotation", lambda g, group: None)
    assert rotated < 0.85 * relative(mlp.run(x), mlp.exact(x)).mean()


def test_a_hessian_is_that_of_the_rotated_inputs() -> None:
    """What GPTQ is told of an input: smoothed, without its outliers, each block rotated."""
    draw = np.random.default_rng(6)
    x = draw.normal(size=(200, 60)).astype(np.float32)
    smooth = draw.uniform(0.5, 2, 60).astype(np.float32)
    constants = SmoothingConstants(smooth=smooth, outliers=np.array([3, 59]))
    stored = StoredWeights({"down.weight": draw.normal(size=(40, 60)).astype(np.float32)})
    assert constants.smooth is not None
    scheme = Int8Scheme({("down",): constants})
    g = Graph(weights=stored, scheme=scheme)
    group = gated_input(Value("x"), Value("ones"))
    hessian = x.T @ x
    scheme.smooth_hessian(g, group, hessian)
    kept = x / smooth
    kept[:, [3, 59]] = 0
    seen = rotate_blocks(kept, block_rotation(60))
    assert np.allclose(hessian, seen.T @ seen, atol=1e-2 * np.abs(hessian).max() * 1e-2)


@pytest.mark.parametrize(
    ("kind", "function"), [("silu", "QuantizeRotatedSwiGLU"), ("gelu_new", "QuantizeRotated")]
)
@pytest.mark.parametrize("outlier", [False, True])
def test_a_gated_product_is_part_of_the_function_that_quantizes_it(
    kind: str, function: str, outlier: bool
) -> None:
    mlp = Rows(64)
    constants = SmoothingConstants(outliers=np.array([3]) if outlier else None)
    g = Graph(weights=StoredWeights(mlp.tensors), scheme=Int8Scheme({("down",): constants}))
    y = g.gated("x", LinearRef("gate"), LinearRef("up"), kind)
    g.linears(y, [LinearRef("down")])
    called = [node.op_type for node in g.nodes if node.domain == DOMAIN]
    sums = ["MatMulIntegerToFloatAdd"] if outlier else []
    assert called == ["QuantizeRows", function + "AndProduct" * outlier, *sums]
    kept = [node.op_type for node in g.nodes if node.domain != DOMAIN]
    assert ("QuickGelu" in kept, "FastGelu" in kept) == (False, kind == "gelu_new")
    multiplied = [node for node in g.nodes if node.op_type == "Mul"]
    assert len(multiplied) == 1 + outlier  # by the scale that waited, never gate by up
