"""Functions of graphs: their bodies are chains of ONNX Runtime's nodes, and the kernels give the same bits.

Of attention, whose kernel rounds otherwise, see ``tests/runtime/kernels/test_attention.py``.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, inliner, numpy_helper

from embedge.export.graph.fused_ops import functions_of
from embedge.export.graph.onnx_model import IR_VERSION, OPSET
from embedge.export.graph.ops import CONTRIB, DOMAIN, VERSION
from embedge.quant.rotation import block_rotation
from embedge.runtime.kernels.register import register
from tests.helpers.kernel import LIBRARY, SETS, using, with_each_instruction_set
from tests.helpers.sessions import open_graph, session_options

Array = NDArray[Any]
DRAW = np.random.default_rng(3)


def floats(*shape: int) -> NDArray[np.float32]:
    """Values of very different sizes, among them exact halves of a step and zeros."""
    values = DRAW.standard_normal(shape) * 10.0 ** DRAW.integers(-3, 3, (*shape[:-1], 1))
    values[..., :: max(1, shape[-1] // 3)] = 0
    return values.astype(np.float32)


def model(
    nodes: list[NodeProto],
    inputs: dict[str, Array],
    constants: dict[str, Array],
    outputs: list[str],
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "test",
        [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(value.dtype), [None] * value.ndim
            )
            for name, value in inputs.items()
        ],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    domains = {"": OPSET, CONTRIB: 1, DOMAIN: VERSION}
    return helper.make_model(
        graph,
        functions=functions_of(nodes, OPSET),
        opset_imports=[helper.make_opsetid(*domain) for domain in domains.items()],
        ir_version=IR_VERSION,
    )


def results(
    proto: onnx.ModelProto, inputs: dict[str, Array], *, own: bool, threads: int = 2
) -> list[Array]:
    options = session_options(own=own, threads=threads)
    if own:
        assert LIBRARY is not None
        register(options, LIBRARY, panels=False)
    session = open_graph(proto, options)
    return [np.asarray(value) for value in session.run(None, inputs)]


def node(op_type: str, inputs: str, outputs: str, domain: str = "", **attributes: Any) -> NodeProto:
    return helper.make_node(op_type, inputs.split(), outputs.split(), domain=domain, **attributes)


def row_nodes(width: int, *, above: bool) -> list[NodeProto]:
    first = [node("Abs", "x", "size")] if not above else []
    last = [node("Max", "highest floor", "peak")] if above else []
    return [
        *first,
        node("ReduceMax", f"{'x' if above else 'size'} axis", "highest", keepdims=1),
        *last,
        node("Mul", f"{'peak' if above else 'highest'} step", "scale"),
        node("QuantizeLinear", "x scale zeros", "values", axis=-1, block_size=width),
    ]


def rotated_nodes(
    width: int, *, gated: bool = False, product_is_read: bool = False
) -> list[NodeProto]:
    gate = [node("QuickGelu", "x", "gate", CONTRIB, alpha=1.0)] if gated else []
    nodes = [
        *gate,
        node("Mul", f"{'gate' if gated else 'x'} y", "product"),
        node("Reshape", "product blocks", "parts"),
        node("MatMul", "parts rotation", "turned"),
        node("Reshape", "turned whole", "rows"),
        node("Abs", "rows", "size"),
        node("ReduceMax", "size axis", "highest", keepdims=1),
        node("Mul", "highest step", "scale"),
        node("QuantizeLinear", "rows scale zeros", "values", axis=-1, block_size=width),
    ]
    if product_is_read:
        nodes.append(node("Gather", "product chosen", "outliers", axis=-1))
    return nodes


def row_call(width: int, *, above: bool) -> NodeProto:
    """The function that stands for :func:`row_nodes`."""
    name, floor = ("QuantizeRowsAbove", "floor ") if above else ("QuantizeRows", "")
    return node(name, f"x {floor}step zeros", "values scale", DOMAIN, width=width)


def rotated_calls(
    width: int, *, gated: bool = False, product_is_read: bool = False
) -> list[NodeProto]:
    """The function that stands for :func:`rotated_nodes`, and what else reads the product."""
    name = f"QuantizeRotated{'SwiGLU' * gated}{'AndProduct' * product_is_read}"
    outputs = f"values scale{' product' * product_is_read}"
    call = node(name, "x y rotation blocks step zeros", outputs, DOMAIN, width=width)
    reader = node("Gather", "product chosen", "outliers", axis=-1)
    return [call, reader] if product_is_read else [call]


def rotated_constants(rows: int, width: int, step: float, zero: int = 128) -> dict[str, Array]:
    rotation = block_rotation(width)
    return {
        **row_constants(rows, step, zero),
        "blocks": np.array([0, 0, -1, len(rotation)]),
        "whole": np.array([0, 0, -1]),
        "rotation": rotation,
        "chosen": np.array([1, width - 1]),
    }


def row_constants(rows: int, step: float, zero: int) -> dict[str, Array]:
    return {
        "axis": np.array([-1]),
        "step": np.array(step, np.float32),
        "zeros": np.full((1, rows, 1), zero, np.uint8),
        "floor": np.array(2.0, np.float32),
    }


ROW_CASES = [(1, 1), (1, 16), (3, 17), (40, 384), (700, 130)]
STEPS = [(1 / 127, 128), (1 / 63, 64), (1 / 235, 20), (2 / 235, 10)]


@pytest.mark.parametrize("above", [False, True], ids=["around zero", "above a floor"])
@pytest.mark.parametrize(("step", "zero"), STEPS)
@pytest.mark.parametrize(("rows", "width"), ROW_CASES)
def test_quantized_rows(rows: int, width: int, step: float, zero: int, above: bool) -> None:
    inputs = {"x": floats(1, rows, width)}
    nodes = row_nodes(width, above=above)
    called = [row_call(width, above=above)]
    constants = row_constants(rows, step, zero)
    if above:
        inputs["x"] = np.maximum(inputs["x"], -2 * 20 / 235)
    agree(nodes, called, inputs, constants, ["values", "scale"])


@pytest.mark.parametrize("product_is_read", [False, True])
@pytest.mark.parametrize(("step", "zero"), STEPS[:2])
@pytest.mark.parametrize(("rows", "width"), [(1, 2), (3, 34), (5, 45), (40, 768), (300, 1104)])
def test_quantized_rows_of_rotated_blocks(
    rows: int, width: int, step: float, zero: int, product_is_read: bool
) -> None:
    inputs = {"x": floats(1, rows, width), "y": floats(1, rows, width)}
    nodes = rotated_nodes(width, product_is_read=product_is_read)
    called = rotated_calls(width, product_is_read=product_is_read)
    constants = rotated_constants(rows, width, step, zero)
    outputs = ["values", "scale", *(["outliers"] if product_is_read else [])]
    agree(nodes, called, inputs, constants, outputs)


@pytest.mark.parametrize("product_is_read", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (3, 45), (40, 768)])
def test_quantized_rows_of_a_swiglu(rows: int, width: int, product_is_read: bool) -> None:
    """Inlined, to the bit; the kernels' ``silu`` is another one, and a level may round the other way."""
    inputs = {"x": 10 * floats(1, rows, width), "y": floats(1, rows, width)}
    inputs["x"][..., -1] = -200
    nodes = rotated_nodes(width, gated=True, product_is_read=product_is_read)
    called = rotated_calls(width, gated=True, product_is_read=product_is_read)
    outputs = ["values", "scale", *(["outliers"] if product_is_read else [])]
    constants = rotated_constants(rows, width, 1 / 127)
    expected = results(model(nodes, inputs, constants, outputs), inputs, own=False)
    proto = model(called, inputs, constants, outputs)
    for value, wanted in zip(results(proto, inputs, own=False), expected, strict=True):
        assert np.array_equal(value, wanted)
    if LIBRARY:
        values, scale, *product = results(proto, inputs, own=True)
        real = expected[1][..., 0] > 0
        levels = values[real].astype(int) - expected[0][real]
        assert np.abs(levels).max(initial=0) <= 1
        assert np.abs(levels).mean() < 1e-3
        assert np.allclose(scale, expected[1], rtol=1e-5, atol=0)
        least = 1e-5 * float(np.abs(inputs["y"]).max())  # ONNX Runtime ends its exponents at 18
        for value, wanted in zip(product, expected[2:], strict=True):
            assert np.allclose(value, wanted, rtol=1e-5, atol=least)


@pytest.mark.parametrize("kind", ["Add", "Sub"])
@pytest.mark.parametrize("shape", [(50,), (2, 9, 50)], ids=["bias", "residual"])
@pytest.mark.parametrize("zero_point", [True, False])
def test_a_product_and_what_is_added(kind: str, shape: tuple[int, ...], zero_point: bool) -> None:
    inputs = {
        "a": DRAW.integers(0, 256, (2, 9, 130), np.uint8),
        "a_scale": floats(2, 9, 1),
        "other": floats(*shape),
    }
    constants: dict[str, Array] = {
        "w": DRAW.integers(-127, 128, (130, 50), np.int8),
        "w_scale": floats(50),
        "zero": np.array(128, np.uint8),
    }
    product = f"a w a_scale w_scale{' zero' if zero_point else ''}"
    nodes = [node("MatMulIntegerToFloat", product, "p", CONTRIB), node(kind, "p other", "y")]
    arguments = f"a w a_scale w_scale other{' zero' if zero_point else ''}"
    called = [node(f"MatMulIntegerToFloat{kind}", arguments, "y", DOMAIN)]
    agree(nodes, called, inputs, constants, ["y"])


def test_of_two_products_one_takes_the_other() -> None:
    nodes = [
        node("MatMulIntegerToFloat", "a w a_scale w_scale", "p", CONTRIB),
        node("MatMulIntegerToFloat", "b v a_scale w_scale", "q", CONTRIB),
        node("Add", "p q", "y"),
        node("Add", "y rest", "z"),
    ]
    both = node("MatMulIntegerToFloatAdd", "b v a_scale w_scale p", "y", DOMAIN)
    inputs = {"a": DRAW.integers(0, 256, (3, 64), np.uint8), "a_scale": floats(3, 1)}
    inputs |= {"b": DRAW.integers(0, 256, (3, 64), np.uint8), "rest": floats(3, 48)}
    weights = {n: DRAW.integers(-127, 128, (64, 48), np.int8) for n in "wv"}
    called = [nodes[0], both, nodes[3]]
    agree(nodes, called, inputs, {**weights, "w_scale": floats(48)}, ["z"])


def agree(
    nodes: list[NodeProto],
    called: list[NodeProto],
    inputs: dict[str, Array],
    constants: dict[str, Array],
    outputs: list[str],
) -> None:
    """The nodes, the calls inlined, and the kernels give the same bits."""
    before = results(model(nodes, inputs, constants, outputs), inputs, own=False)
    expected = dict(zip(outputs, before, strict=True))
    proto = model(called, inputs, constants, outputs)
    for kernels, threads in itertools.product((None, *SETS), (1, 2)):
        with using(kernels) if kernels else contextlib.nullcontext():
            after = results(proto, inputs, own=kernels is not None, threads=threads)
        found = dict(zip(outputs, after, strict=True))
        for name, value in found.items():
            wanted = expected[name]
            if value.dtype == np.uint8:  # of a row of zeros they stand for nothing
                real = expected[name.replace("values", "scale")] > 0
                assert np.array_equal(value[real[..., 0]], wanted[real[..., 0]]), (name, kernels)
            else:
                assert np.array_equal(value, wanted), (name, kernels, threads)
            assert value.shape == wanted.shape, name


@with_each_instruction_set
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_makes_its_rows_scale_so_and_no_other(broken: float) -> None:
    x = floats(1, 3, 64)
    x[0, 1, 40] = broken
    constants = row_constants(3, 1 / 127, 128)
    proto = model([row_call(64, above=False)], {"x": x}, constants, ["scale"])
    [scale] = results(proto, {"x": x}, own=True)
    assert np.isfinite(scale[0, :, 0]).tolist() == [True, False, True]
    inputs = {"x": x, "y": np.ones_like(x)}
    for gated in (False, True):
        called = rotated_calls(64, gated=gated)
        proto = model(called, inputs, rotated_constants(3, 64, 1 / 127), ["scale"])
        [scale] = results(proto, inputs, own=True)
        still = gated and broken == -np.inf  # whose silu is 0, and in the kernel NaN
        if not still:
            assert np.isfinite(scale[0, :, 0]).tolist() == [True, False, True]


def test_onnx_inlines_what_is_called() -> None:
    x = floats(1, 3, 64)
    called = [row_call(64, above=False)]
    proto = model(called, {"x": x}, row_constants(3, 1 / 127, 128), ["values", "scale"])
    inlined = inliner.inline_local_functions(proto)
    assert {n.domain for n in inlined.graph.node} == {""}
    assert not inlined.functions
    for value, wanted in zip(
        results(inlined, {"x": x}, own=False), results(proto, {"x": x}, own=False), strict=True
    ):
        assert np.array_equal(value, wanted)


@with_each_instruction_set
@pytest.mark.parametrize(
    ("outputs", "inputs", "message"),
    [
        (["values"], {"x": np.ones((1, 2, 0), np.float32)}, "rows of at least one value"),
        (["values"], {"x": np.ones((1, 4, 8), np.float32)}, "a zero point for each row"),
    ],
)
def test_the_kernels_refuse_what_does_not_fit(
    outputs: list[str], inputs: dict[str, Array], message: str
) -> None:
    constants = row_constants(3, 1 / 127, 128)
    proto = model([row_call(8, above=False)], inputs, constants, outputs)
    with pytest.raises(Exception, match=message):
        results(proto, inputs, own=True)


@with_each_instruction_set
@pytest.mark.parametrize(
    ("rotation", "rows", "message"),
    [
        (np.ones((17, 17)), 3, "a square matrix of at most 16 rows"),
        (np.ones((4, 8)), 3, "a square matrix of at most 16 rows"),
        (np.ones((3, 3)), 3, "that rows are multiples of"),
        (np.ones((4, 4)), 2, "a zero point for each row"),
    ],
)
def test_a_rotation_that_does_not_fit_is_refused(rotation: Array, rows: int, message: str) -> None:
    inputs = {"x": floats(1, 3, 64), "y": floats(1, 3, 64)}
    constants = rotated_constants(rows, 64, 1 / 127)
    constants["rotation"] = rotation.astype(np.float32)
    proto = model(rotated_calls(64), inputs, constants, ["scale"])
    with pytest.raises(Exception, match=message):
        results(proto, inputs, own=True)


@with_each_instruction_set
def test_what_is_added_has_the_size_of_a_row_or_of_the_product() -> None:
    called = [node("MatMulIntegerToFloatAdd", "a w s t other", "y", DOMAIN)]
    constants: dict[str, Array] = {
        "w": np.ones((8, 16), np.int8),
        "s": np.ones(1, np.float32),
        "t": np.ones(1, np.float32),
    }
    inputs: dict[str, Array] = {"a": np.ones((4, 8), np.uint8), "other": floats(2, 16)}
    with pytest.raises(Exception, match="expected a value to add for each column"):
        results(model(called, inputs, constants, ["y"]), inputs, own=True)


def test_only_what_is_called_is_defined() -> None:
    called = [row_call(64, above=False)]
    assert [f.name for f in functions_of(called, OPSET)] == ["QuantizeRows"]
    assert functions_of([node("Abs", "x", "y")], OPSET) == []
    assert TensorProto.UINT8 == 2  # the kernels' element types are ONNX's numbers
