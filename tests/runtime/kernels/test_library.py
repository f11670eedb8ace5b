"""embedge's kernel for 8-bit matmuls: the results of ONNX Runtime's, and when it is used."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from embedge.runtime import Embedder, EmbedgeValueError, EmbedgeWarning
from embedge.runtime.kernels import library as library_module
from embedge.runtime.kernels.library import (
    describe_kernels,
    kernel_instructions,
    kernel_library,
    own_kernels,
    use_own_kernels,
)
from embedge.runtime.kernels.register import register
from embedge.runtime.kernels.repack import in_panels
from tests.helpers.kernel import (
    LIBRARY,
    SETS,
    asked_anew,
    layouts_seen,
    needs_kernel,
    with_each_instruction_set,
    without_kernel,
)
from tests.helpers.sessions import open_graph, session_options

Array = NDArray[Any]

ROWS = (*range(1, 10), 16, 17, 24, 40, 65, 130)
DEPTHS = (1, 3, 4, 130, 256)
COLUMNS = (1, 15, 16, 17, 48, 50, 64, 100, 200)
ZERO_POINTS = (None, 0, 128, 255)
# of weights: in panels, and as they are for their size or because they do not fill them
PANELLED = [(68, 64), (256, 64), (1024, 208)]
LEFT = [(64, 64), (4, 16), (130, 64), (256, 50), (130, 50)]
WORDS = [f"w{i}" for i in range(30)]


def activations(draw: np.random.Generator, rows: int, depth: int) -> NDArray[np.uint8]:
    return draw.integers(0, 256, (rows, depth), np.uint8)


def weights(draw: np.random.Generator, depth: int, columns: int) -> NDArray[np.int8]:
    return draw.integers(-128, 128, (depth, columns), np.int8)


def scales(draw: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return draw.uniform(0.001, 2, shape).astype(np.float32)


def product_model(
    weight: NDArray[np.int8], w_scale: Array, zero_point: int | None = 128, *, constant: bool = True
) -> bytes:
    """``y = a_scale · w_scale · ((a - zero_point) @ w)`` of inputs ``a`` and ``a_scale``."""
    values: dict[str, Array] = {"w": weight, "w_scale": w_scale}
    names = ["a", "w", "a_scale", "w_scale"]
    if zero_point is not None:
        values["zero_point"] = np.array(zero_point, np.uint8)
        names.append("zero_point")
    info = helper.make_tensor_value_info
    inputs = [info("a", TensorProto.UINT8, None), info("a_scale", TensorProto.FLOAT, None)]
    if not constant:
        inputs.append(info("w", TensorProto.INT8, values.pop("w").shape))
    node = helper.make_node("MatMulIntegerToFloat", names, ["y"], domain="com.microsoft")
    tensors = [numpy_helper.from_array(value, name) for name, value in values.items()]
    graph = helper.make_graph(
        [node], "product", inputs, [info("y", TensorProto.FLOAT, None)], tensors
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return bytes(model.SerializeToString())


def open_session(model: bytes, *, own: bool = True, panels: bool = False, threads: int = 1) -> Any:
    options = session_options(own=own, threads=threads)
    if own:
        assert LIBRARY is not None
        register(options, LIBRARY, panels=panels)
    return open_graph(model, options)


def run(session: Any, a: Array, a_scale: Array) -> Array:
    [y] = session.run(None, {"a": a, "a_scale": a_scale})
    return np.asarray(y)


def exact(a: Array, weight: Array, a_scale: Array, w_scale: Array, zero_point: int = 128) -> Array:
    """The product of whole numbers, which float64 holds exactly, and its scales in float32."""
    whole = (a.astype(np.float64) - zero_point) @ weight.astype(np.float64)
    return np.asarray(whole.astype(np.int64).astype(np.float32) * w_scale * a_scale)


# -- results ------------------------------------------------------------------------------------------


@pytest.mark.slow
@with_each_instruction_set
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("columns", COLUMNS)
def test_matmuls_are_those_of_onnx_runtime_to_the_bit(columns: int, threads: int) -> None:
    for case, model, results in matmuls(columns, threads):
        own = open_session(model, threads=threads)
        for inputs, expected in results:
            found = run(own, *inputs)
            assert found.shape == expected.shape
            assert np.array_equal(found, expected), (case, found.shape)


@functools.lru_cache(maxsize=1)  # every instruction set runs them in turn
def matmuls(columns: int, threads: int) -> list[tuple[Any, bytes, list[tuple[Any, Array]]]]:
    """Models, and what ONNX Runtime's kernel gives for inputs."""
    draw, found = np.random.default_rng(columns), []
    for case in itertools.product(DEPTHS, ZERO_POINTS, [(1,), (columns,)]):
        depth, zero_point, shape = case
        model = product_model(weights(draw, depth, columns), scales(draw, *shape), zero_point)
        theirs, results = open_session(model, own=False, threads=threads), []
        for rows in ROWS:
            a, a_scale = activations(draw, rows, depth), scales(draw, rows, 1)
            batch = next(size for size in (5, 3, 2, 1) if rows % size == 0)
            for inputs in (
                (a, np.ones(1, np.float32)),  # as graphs have it where a later factor scales rows
                (a, a_scale),
                (a.reshape(batch, -1, depth), a_scale.reshape(batch, -1, 1)),
            ):
                results.append((inputs, run(theirs, *inputs)))
        found.append((case, model, results))
    return found


@with_each_instruction_set
@pytest.mark.parametrize("columns", [1, 50, 64])
def test_one_scale_for_all_rows_gives_the_same_bits(columns: int) -> None:
    """ONNX Runtime multiplies it by the columns' scales first."""
    draw = np.random.default_rng(columns)
    for shape in ((), (1,), (columns,)):
        model = product_model(weights(draw, 130, columns), scales(draw, *shape))
        own, theirs = open_session(model), open_session(model, own=False)
        for a_scale in (scales(draw, 1), np.array(0.37, np.float32)):
            a = activations(draw, 21, 130)
            found, expected = run(own, a, a_scale), run(theirs, a, a_scale)
            assert np.array_equal(found, expected)


@with_each_instruction_set
@pytest.mark.parametrize("value", [127, -127, -128])
def test_the_largest_values_do_not_saturate(value: int) -> None:
    weight, w_scale = np.full((1023, 50), value, np.int8), np.full(50, 0.37, np.float32)
    weight[::3, 1::2] //= 2
    draw = np.random.default_rng(1)
    for zero_point in (0, 128, 255):
        session = open_session(product_model(weight, w_scale, zero_point))
        for rows, a in itertools.product((1, 8, 21), (0, 255)):
            left, a_scale = np.full((rows, 1023), a, np.uint8), scales(draw, rows, 1)
            expected = exact(left, weight, a_scale, w_scale, zero_point)
            assert np.array_equal(run(session, left, a_scale), expected)


@with_each_instruction_set
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("rows", "depth", "columns"),
    [(300, 1024, 3100), (700, 512, 40), (1, 1024, 6250), (65, 2051, 160)],
)
def test_matmuls_of_many_tasks_are_exact(rows: int, depth: int, columns: int, threads: int) -> None:
    draw = np.random.default_rng(rows)
    weight, w_scale = weights(draw, depth, columns), scales(draw, columns)
    a, a_scale = activations(draw, rows, depth), scales(draw, rows, 1)
    session = open_session(product_model(weight, w_scale), threads=threads)
    assert np.array_equal(run(session, a, a_scale), exact(a, weight, a_scale, w_scale))


@with_each_instruction_set
@pytest.mark.parametrize("shape", PANELLED + LEFT)
def test_weights_in_panels_give_the_same_matmuls(shape: tuple[int, int]) -> None:
    draw = np.random.default_rng(shape)
    weight, w_scale = weights(draw, *shape), scales(draw, shape[1])
    rows = open_session(product_model(weight, w_scale))
    panels = open_session(product_model(in_panels(weight), w_scale), panels=True)
    for count in (1, 7, 20):
        a, a_scale = activations(draw, count, shape[0]), scales(draw, count, 1)
        expected = exact(a, weight, a_scale, w_scale)
        assert np.array_equal(run(rows, a, a_scale), expected)
        assert np.array_equal(run(panels, a, a_scale), expected)


@with_each_instruction_set
def test_no_rows_have_no_result() -> None:
    session = open_session(product_model(np.ones((130, 50), np.int8), np.ones(50, np.float32)))
    for leading in ((0,), (0, 3), (3, 0)):
        for a_scale in (np.ones(1, np.float32), np.ones((*leading, 1), np.float32)):
            found = run(session, np.empty((*leading, 130), np.uint8), a_scale)
            assert found.shape == (*leading, 50) and found.dtype == np.float32


# -- what it refuses ----------------------------------------------------------------------------------


@needs_kernel
def test_a_weight_that_is_not_constant_is_refused() -> None:
    model = product_model(np.ones((8, 16), np.int8), np.ones(16, np.float32), constant=False)
    with pytest.raises(Exception, match="embedge matmul: the weight is not constant"):
        open_session(model)


@needs_kernel
def test_a_weight_of_three_dimensions_is_refused() -> None:
    model = product_model(np.ones((1, 8, 16), np.int8), np.ones(16, np.float32))
    with pytest.raises(Exception, match="embedge matmul: the weight has not two dimensions"):
        open_session(model)


@with_each_instruction_set
@pytest.mark.parametrize(
    ("depth", "rows", "columns", "message"),
    [
        (7, 3, 16, "rows and weight differ in depth"),
        (8, 2, 16, "expected one scale, or one for each row"),
        (8, 3, 15, "expected one scale, or one for each column"),
    ],
)
def test_inputs_that_do_not_fit_the_weight_are_refused(
    depth: int, rows: int, columns: int, message: str
) -> None:
    session = open_session(product_model(np.ones((8, 16), np.int8), np.ones(columns, np.float32)))
    with pytest.raises(Exception, match=f"embedge matmul: {message}"):
        run(session, np.ones((3, depth), np.uint8), np.ones((rows, 1), np.float32))


# -- sessions -----------------------------------------------------------------------------------------


@with_each_instruction_set
@pytest.mark.parametrize("threads", [1, 2])
def test_one_session_may_run_in_several_threads(threads: int) -> None:
    draw = np.random.default_rng(2)
    weight, w_scale = weights(draw, 256, 500), scales(draw, 500)
    session = open_session(product_model(weight, w_scale), threads=threads)
    inputs = [(activations(draw, n, 256), scales(draw, n, 1)) for n in range(1, 41)]
    with ThreadPoolExecutor(4) as executor:
        found = list(executor.map(lambda pair: run(session, *pair), inputs))
    for (a, a_scale), y in zip(inputs, found, strict=True):
        assert np.array_equal(y, exact(a, weight, a_scale, w_scale))


@needs_kernel
def test_sessions_come_and_go() -> None:
    draw = np.random.default_rng(3)
    weight, w_scale = weights(draw, 256, 64), scales(draw, 64)
    a, a_scale = activations(draw, 5, 256), scales(draw, 5, 1)
    models = {
        panels: product_model(in_panels(weight) if panels else weight, w_scale)
        for panels in (False, True)
    }
    expected = exact(a, weight, a_scale, w_scale)
    stay = [open_session(model, panels=panels) for panels, model in models.items()]
    for number in range(20):
        panels = number % 2 == 1
        session = open_session(models[panels], panels=panels)
        assert np.array_equal(run(session, a, a_scale), expected)
        del session
    for session in stay:
        assert np.array_equal(run(session, a, a_scale), expected)


@with_each_instruction_set
def test_a_session_without_the_kernel_may_lie_beside_one_with_it() -> None:
    weight, w_scale = np.ones((8, 16), np.int8), np.ones(16, np.float32)
    a, a_scale = np.ones((3, 8), np.uint8), np.ones((2, 1), np.float32)
    own, theirs = (open_session(product_model(weight, w_scale), own=own) for own in (True, False))
    with pytest.raises(Exception, match="embedge matmul"):
        run(own, a, a_scale)
    with pytest.raises(Exception, match="broadcast an axis"):
        run(theirs, a, a_scale)


@needs_kernel
def test_several_threads_may_open_sessions_at_once() -> None:
    draw = np.random.default_rng(4)
    weight, w_scale = weights(draw, 256, 64), scales(draw, 64)
    a, a_scale = activations(draw, 5, 256), scales(draw, 5, 1)
    expected = exact(a, weight, a_scale, w_scale)
    start = threading.Barrier(8)

    def open_and_run(number: int) -> bool:
        panels = number % 2 == 1
        model = product_model(in_panels(weight) if panels else weight, w_scale)
        start.wait(timeout=60)
        sessions = [open_session(model, panels=panels) for _ in range(5)]
        return all(np.array_equal(run(s, a, a_scale), expected) for s in sessions)

    with ThreadPoolExecutor(8) as executor:
        assert all(executor.map(open_and_run, range(8)))


# -- panels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", PANELLED[:2])
def test_a_line_holds_four_values_of_each_of_16_columns(shape: tuple[int, int]) -> None:
    depth, columns = shape
    weight = weights(np.random.default_rng(shape), depth, columns)
    found = in_panels(weight)
    assert found.shape == weight.shape and found.dtype == np.int8
    expected = [
        weight[first_row + row, first_column + column]
        for first_column in range(0, columns, 16)
        for first_row in range(0, depth, 4)
        for column in range(16)
        for row in range(4)
    ]
    assert found.ravel().tolist() == [int(value) for value in expected]


@pytest.mark.parametrize("shape", LEFT)
def test_small_weights_and_those_that_do_not_fill_panels_stay(shape: tuple[int, int]) -> None:
    weight = np.zeros(shape, np.int8)
    assert in_panels(weight) is weight


def test_weights_of_a_file_are_laid_out_too(tmp_path: Path) -> None:
    weight = weights(np.random.default_rng(6), 256, 64)
    weight.tofile(tmp_path / "w")
    mapped = np.memmap(tmp_path / "w", np.int8, "r", shape=weight.shape)
    assert np.array_equal(in_panels(mapped), in_panels(weight))


# -- when it is used ----------------------------------------------------------------------------------


@needs_kernel
def test_the_kernel_is_asked_for_in_the_layout_of_the_weights() -> None:
    for panels, layout in ((False, "rows"), (True, "panels")):
        options = onnxruntime.SessionOptions()
        use_own_kernels(options, panels=panels)
        assert options.get_session_config_entry("embedge.weights") == layout


@pytest.mark.slow
def test_the_environment_turns_it_off() -> None:
    with without_kernel():
        assert kernel_library() is None
        assert not own_kernels()
        with layouts_seen() as seen:
            use_own_kernels(onnxruntime.SessionOptions())
        assert seen == []
    assert kernel_library() == LIBRARY


def test_with_amx_onnx_runtime_multiplies() -> None:
    with asked_anew() as patch:
        patch.delenv("EMBEDGE_KERNELS", raising=False)
        patch.setattr(library_module, "has_amx", lambda: True)
        assert not own_kernels()
        assert kernel_instructions() is None


def find_library(patch: pytest.MonkeyPatch, file: Path | str | None) -> None:
    """Lets a file be the kernel's, or none, on any processor."""
    patch.delenv("EMBEDGE_KERNELS", raising=False)
    patch.setattr(library_module, "has_amx", lambda: False)
    find = importlib.util.find_spec

    def find_spec(name: str, *arguments: Any) -> Any:
        if name != "embedge.runtime.kernels._native":
            return find(name, *arguments)
        return None if file is None else SimpleNamespace(origin=str(file))

    patch.setattr(importlib.util, "find_spec", find_spec)


def test_where_it_was_not_built_a_bundle_embeds_all_the_same(int8_bundle: tuple[Path, Any]) -> None:
    path, exact_vectors = int8_bundle
    with asked_anew() as patch:
        find_library(patch, None)
        assert kernel_library() is None
        found = Embedder(path, verify="none").encode(WORDS)
    expected = exact_vectors[4:34]  # "w0" is id 4
    assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)


def test_a_processor_without_its_instructions_goes_without_it() -> None:
    with asked_anew() as patch:
        find_library(patch, "kernel.so")
        patch.setattr(library_module, "choose", lambda file, name: None)
        assert kernel_library() is None
        assert describe_kernels() == (
            "ONNX Runtime's: the processor does not have the instructions of avx2"
        )


@pytest.mark.parametrize(
    ("is_right", "problem"),
    [
        (lambda library: False, "it computes wrong values"),
        (lambda library: 1 / 0, "division by zero"),
    ],
    ids=["wrong", "failed"],
)
def test_a_kernel_that_fails_its_check_is_left_out_with_a_warning(
    is_right: Any, problem: str, int8_bundle: tuple[Path, Any]
) -> None:
    path, _ = int8_bundle
    with without_kernel():
        expected = Embedder(path, verify="none").encode(WORDS)
    with asked_anew() as patch:
        find_library(patch, "kernel.so")
        patch.setattr(library_module, "choose", lambda file, name: "avx2")
        patch.setattr("embedge.runtime.kernels.self_check.is_right", is_right)
        message = (
            rf"^kernel\.so: not used: {problem}; ONNX Runtime's own kernels run instead, "
            "slower; install embedge again, or set EMBEDGE_KERNELS=onnxruntime to keep it out$"
        )
        with pytest.warns(EmbedgeWarning, match=message) as warned:
            found = Embedder(path, verify="none").encode(WORDS)
    assert len(warned) == 1
    assert np.array_equal(found, expected)


def test_a_file_that_is_no_library_is_left_out_with_a_warning(tmp_path: Path) -> None:
    file = tmp_path / "kernel.so"
    file.write_text("not a library")
    with asked_anew() as patch:
        find_library(patch, file)
        with pytest.warns(EmbedgeWarning, match=rf"{file}: not used: .*install embedge again"):
            assert kernel_library() is None


@pytest.mark.slow
def test_the_switch_takes_names_alone() -> None:
    with asked_anew() as patch:
        patch.setenv("EMBEDGE_KERNELS", "off")
        message = "^EMBEDGE_KERNELS: expected embedge, onnxruntime, avx512-vnni, avx-vnni or avx2, found 'off'$"
        with pytest.raises(EmbedgeValueError, match=message):
            own_kernels()
    for value in ("", "embedge"):
        with asked_anew() as patch:
            patch.setenv("EMBEDGE_KERNELS", value)
            assert kernel_library() == LIBRARY


@needs_kernel
@pytest.mark.parametrize("name", SETS)
def test_the_switch_chooses_an_instruction_set(name: str) -> None:
    with asked_anew() as patch:
        patch.setenv("EMBEDGE_KERNELS", name)
        assert kernel_instructions() == name
        assert kernel_library() is not None
        assert describe_kernels() == f"embedge's own, with {name}"
    kernel_library()  # the one of the other tests again


def test_an_instruction_set_that_is_not_there_is_refused() -> None:
    """Without it nothing else would run than what was asked for."""
    message = (
        "^EMBEDGE_KERNELS=avx2: the processor does not have the instructions of avx2; unset it, or take "
        "EMBEDGE_KERNELS=onnxruntime for ONNX Runtime's kernels$"
    )
    with asked_anew() as patch:
        find_library(patch, "kernel.so")
        patch.setenv("EMBEDGE_KERNELS", "avx2")
        patch.setattr(library_module, "choose", lambda file, name: None)
        with pytest.raises(EmbedgeValueError, match=message):
            own_kernels()
    with asked_anew() as patch:
        find_library(patch, None)
        patch.setenv("EMBEDGE_KERNELS", "avx2")
        with pytest.raises(EmbedgeValueError, match="take a C compiler to install; unset it"):
            own_kernels()


@pytest.mark.parametrize("shape", [(256, 64), (64, 4, 32)])
def test_panels_may_lie_on_a_disk_and_leave_nothing(shape: tuple[int, ...], tmp_path: Path) -> None:
    draw = np.random.default_rng(4)
    weight = draw.integers(0, 127, shape).astype(np.int8 if len(shape) == 2 else np.uint8)
    panels = in_panels(weight, tmp_path)
    assert np.array_equal(panels, in_panels(weight))
    assert not np.array_equal(panels, weight)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@with_each_instruction_set
def test_an_int8_bundle_has_the_same_vectors_with_and_without_it(
    int8_bundle: tuple[Path, Any],
) -> None:
    path, _ = int8_bundle

    def encode() -> list[Array]:
        model = Embedder(path, verify="none", threads=2)
        return [model.encode(texts) for texts in (WORDS[:1], WORDS[:7], WORDS)]

    with layouts_seen() as seen:
        found = encode()
    with without_kernel():
        expected = encode()
    assert set(seen) == {False}
    for with_it, without in zip(found, expected, strict=True):
        assert np.array_equal(with_it, without)
