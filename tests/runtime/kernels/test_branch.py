"""Branches in embedge's kernels: what numpy says to the bit, whoever gives their matrices, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from embedge.runtime.kernels.register import register
from embedge.runtime.kernels.repack import in_panels
from tests.export.graph.test_branch_functions import (
    A_ZERO_POINT,
    NAMES,
    Shape,
    branch_of,
    int4_case,
    int8_case,
    panels,
    rows_case,
    up_operands,
)
from tests.helpers.kernel import LIBRARY, with_each_instruction_set
from tests.helpers.sessions import open_graph, session_options

Array = NDArray[Any]
Change = Callable[[dict[str, Array]], None]

SHAPES = [
    Shape(1, 1, 4, 16, 16),
    Shape(1, 7, 64, 16, 32),
    Shape(2, 9, 132, 32, 48),
    Shape(3, 40, 256, 64, 144),
    Shape(1, 23, 128, 80, 80),  # a rank of more than one slab
]
MANY_TASKS = Shape(2, 150, 1024, 64, 3104)
with_shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


def opened(built: onnx.ModelProto, *, threads: int = 1, stored: bool = False) -> Any:
    """A session with the kernels; ``stored``: its weights lie in panels."""
    options = session_options(own=True, threads=threads)
    assert LIBRARY is not None
    register(options, LIBRARY, panels=stored)
    if stored:
        built = onnx.ModelProto.FromString(built.SerializeToString())
        [weight] = [tensor for tensor in built.graph.initializer if tensor.name == "w"]
        weight.CopyFrom(numpy_helper.from_array(in_panels(numpy_helper.to_array(weight)), "w"))
    return open_graph(built, options)


def run(session: Any, fed: dict[str, Array]) -> list[Array]:
    return [np.asarray(value) for value in session.run(None, fed)]


def branch_alone(shape: Shape, *, threads: int = 1) -> tuple[Any, dict[str, Array]]:
    """A session of a product that is zero, and a branch; and what it is fed."""
    built, fed, _ = int8_case(shape, "", constant=False)
    return opened(built, threads=threads), {**fed, "a": np.full_like(fed["a"], A_ZERO_POINT)}


# -- results ------------------------------------------------------------------------------------------


@with_each_instruction_set
@with_shapes
def test_rows_of_a_branch(shape: Shape) -> None:
    for zero_point, constant, threads in itertools.product((128, 20), (False, True), (1, 2)):
        built, fed, expected = rows_case(shape, zero_point, constant=constant)
        found = run(opened(built, threads=threads), fed)
        for value, wanted in zip(found, expected, strict=True):
            assert np.array_equal(value, wanted), (zero_point, constant, threads)
            assert value.shape == wanted.shape


@with_each_instruction_set
@with_shapes
@pytest.mark.parametrize("how", NAMES)
def test_a_product_and_a_branch(shape: Shape, how: str) -> None:
    for constant, stored in itertools.product((False, True), (False, True)):
        built, fed, expected = int8_case(shape, how, constant=constant)
        [found] = run(opened(built, threads=1 + stored, stored=stored), fed)
        assert np.array_equal(found, expected), (constant, stored)


@with_each_instruction_set
@with_shapes
def test_a_product_of_4_bits_and_a_branch(shape: Shape) -> None:
    """The kernels' own product plus what numpy says of the branch."""
    for constant, stored in itertools.product((False, True), (False, True)):
        built, fed, (plain, branch) = int4_case(shape, constant=constant)
        [found] = run(opened(built, threads=1 + stored, stored=stored), fed)
        [main] = run(opened(plain), {"x": fed["x"]})
        assert np.array_equal(found, main + branch), (constant, stored)


@pytest.mark.slow
@with_each_instruction_set
@pytest.mark.parametrize("threads", [1, 2])
def test_branches_of_many_tasks(threads: int) -> None:
    built, fed, expected = int8_case(MANY_TASKS, "Add", constant=False)
    [found] = run(opened(built, threads=threads), fed)
    assert np.array_equal(found, expected)
    built, fed, rows = rows_case(MANY_TASKS, 128, constant=False)
    for value, wanted in zip(run(opened(built, threads=threads), fed), rows, strict=True):
        assert np.array_equal(value, wanted)


@with_each_instruction_set
def test_a_result_does_not_depend_on_the_rows_beside_it() -> None:
    shape = Shape(1, 21, 132, 32, 48)
    cases = [int8_case(shape, "", constant=True), int4_case(shape, constant=True)]
    for built, fed, _ in (*cases, rows_case(shape, 128, constant=True)):
        session = opened(built)
        together = run(session, fed)
        for row in (0, 5, 20):
            alone = run(session, {n: v[:, row : row + 1] if v.ndim else v for n, v in fed.items()})
            for value, whole in zip(alone, together, strict=True):
                assert np.array_equal(value[:, 0], whole[:, row])


@with_each_instruction_set
@pytest.mark.parametrize("threads", [1, 2])
def test_one_session_serves_several_branches_at_once(threads: int) -> None:
    shape = SHAPES[3]
    session, fed = branch_alone(shape, threads=threads)
    rows, matrix = up_operands(shape)
    draw = np.random.default_rng(1)
    ups = [draw.integers(-63, 64, matrix["up"].shape, np.int8) for _ in range(8)]
    feeds = [{**fed, "up": panels(up)} for up in ups]
    with ThreadPoolExecutor(4) as executor:
        found = list(executor.map(lambda feed: run(session, feed)[0], feeds * 3))
    for up, value in zip(ups * 3, found, strict=True):
        assert np.array_equal(value, branch_of(rows, {**matrix, "up": up}))


@with_each_instruction_set
@pytest.mark.parametrize("value", [64, 65, 127, -128])
def test_larger_values_than_a_branch_has_do_not_saturate(value: int) -> None:
    shape = Shape(1, 13, 132, 48, 64)
    session, fed = branch_alone(shape)
    rows, matrix = up_operands(shape)
    matrix["up"][:, ::3] = value
    rows["branch_values"] = np.full((1, 13, 48), 255, np.uint8)
    [found] = run(session, {**fed, **rows, "up": panels(matrix["up"])})
    assert np.array_equal(found, branch_of(rows, matrix))


@with_each_instruction_set
def test_larger_values_than_rows_of_a_branch_have_do_not_saturate() -> None:
    shape = Shape(1, 13, 132, 48, 64)
    built, fed, _ = rows_case(shape, 0, constant=False)
    down = np.full((132, 48), 127, np.int8)
    down[::3, ::2] = -128
    fed |= {"down": panels(down), "values": np.full((1, 13, 132), 255, np.uint8)}
    _, scale = run(opened(built), fed)
    whole = fed["values"].astype(np.float64) @ down
    exact = whole.astype(np.float32) * fed["down_scale"] * fed["scale"]
    assert np.array_equal(scale, np.abs(exact).max(axis=-1, keepdims=True) * fed["step"])


# -- what it refuses ----------------------------------------------------------------------------------


def emptied(*names: str) -> Change:
    """Rows of these names become none."""

    def change(fed: dict[str, Array]) -> None:
        for name in names:
            fed[name] = fed[name][:, :0]

    return change


@with_each_instruction_set
def test_no_rows_have_no_result() -> None:
    shape = SHAPES[1]
    built, fed, _ = int8_case(shape, "Sub", constant=False)
    emptied("a", "a_scale", "other", "branch_values", "branch_scale")(fed)
    [found] = run(opened(built), fed)
    assert found.shape == (1, 0, shape.columns)
    built, fed, _ = rows_case(shape, 128, constant=False)
    emptied("values", "scale", "zeros")(fed)
    values, scale = run(opened(built), fed)
    assert (values.shape, scale.shape) == ((1, 0, shape.rank), (1, 0, 1))
    built, fed, _ = int4_case(shape, constant=False)
    emptied("x", "branch_values", "branch_scale")(fed)
    [found] = run(opened(built), fed)
    assert found.shape == (1, 0, shape.columns)


def given(name: str, *shape: int) -> Change:
    """A tensor of another shape."""

    def change(fed: dict[str, Array]) -> None:
        fed[name] = np.ones(shape, fed[name].dtype)

    return change


def both(*changes: Change) -> Change:
    def change(fed: dict[str, Array]) -> None:
        for one in changes:
            one(fed)

    return change


UP_OF_16_COLUMNS_MORE = both(given("up", 3, 4, 16, 4), given("up_scale", 48))
RANK_OF_8 = both(given("up", 2, 2, 16, 4), given("branch_values", 1, 7, 8))
PANELS = r"expected panels of the shape \[columns / 16, depth / 4, 16, 4\]"
REFUSED: dict[str, tuple[Change, str]] = {
    "no panels": (given("up", 16, 32), PANELS),
    "panels of 8 columns": (given("up", 2, 4, 8, 4), PANELS),
    "panels of 2 rows a line": (given("up", 2, 4, 16, 2), PANELS),
    "no columns": (given("up", 0, 4, 16, 4), PANELS),
    "no depth": (given("up", 2, 0, 16, 4), PANELS),
    "another rank": (given("up", 2, 8, 16, 4), "rows and panels differ in depth"),
    "a rank of 8": (RANK_OF_8, "expected a rank that is a multiple of 16"),
    "more columns": (UP_OF_16_COLUMNS_MORE, "expected panels of as many columns as the matmul has"),
    "fewer rows": (
        both(given("branch_values", 1, 6, 16), given("branch_scale", 1, 6, 1)),
        "expected as many rows as the matmul has",
    ),
    "a scale too few": (given("branch_scale", 1, 6, 1), "expected a scale for each row"),
    "a column's scale too few": (given("up_scale", 31), "expected a scale for each column"),
    "one scale for all columns": (given("up_scale", 1), "expected a scale for each column"),
    "scalar rows": (given("branch_values"), "rows and panels differ in depth"),
}


def freed(built: onnx.ModelProto) -> onnx.ModelProto:
    """A model whose inputs may have any number of dimensions."""
    for value in built.graph.input:
        value.type.tensor_type.ClearField("shape")
    return built


@with_each_instruction_set
@pytest.mark.parametrize("case", REFUSED)
def test_a_branch_that_does_not_fit_is_refused(case: str) -> None:
    change, message = REFUSED[case]
    eight, four = (
        int8_case(SHAPES[1], "Add", constant=False),
        int4_case(SHAPES[1], constant=False),
    )
    for built, fed, _ in (eight, four):
        session = opened(freed(built))
        change(fed)
        with pytest.raises(Exception, match=f"embedge branch: {message}"):
            run(session, fed)


@with_each_instruction_set
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (given("down", 16, 64), PANELS),
        (given("down", 1, 8, 16, 4), "rows and panels differ in depth"),
        (
            both(given("down", 2, 16, 16, 4), given("down_scale", 32)),
            "expected panels of as many columns as the rank",
        ),
        (given("down_scale", 15), "expected a scale for each column"),
        (given("scale", 1, 6, 1), "expected a scale for each row"),
        (given("zero_point", 2), "expected one zero point"),
        (given("step", 2), "expected one step, and a zero point for each row"),
        (given("zeros", 1, 6, 1), "expected one step, and a zero point for each row"),
    ],
)
def test_rows_of_a_branch_that_do_not_fit_are_refused(change: Change, message: str) -> None:
    built, fed, _ = rows_case(SHAPES[1], 128, constant=False)
    session = opened(freed(built))
    change(fed)
    with pytest.raises(Exception, match=f"embedge branch: {message}"):
        run(session, fed)
