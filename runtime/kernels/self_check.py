"""Tries embedge's kernels on small matrices whose results are known, before a process uses them.

A library may have been compiled by anything, and for another ONNX Runtime. All operators are nodes of one model. It
is opened once for each layout of weights, the second time with the matmuls alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from embedge.runtime.bundle.onnx_model import FLOAT, INT32, INT64, UINT8
from embedge.runtime.host.onnxruntime import load_onnxruntime, open_session
from embedge.runtime.host.probe_models import ProbeNode, ValueType, model_of_nodes
from embedge.runtime.kernels.register import register
from embedge.runtime.kernels.repack import in_panels, panels_of

__all__ = ["is_right"]

_ROWS = (1, 21, 260)  # the last ones in tasks, for two threads
_SIZES = ((130, 50), (256, 64))  # depth and columns: neither fills its panels; both do
_RANK = 16  # of branches, beside matmuls that fill their panels
_BLOCK = 32
_WIDTH, _BLOCK_ROTATED = 128, 16  # of quantized rows
_STEP = np.float32(1 / 127)
_LEVEL = 0.51  # of rounding to a level
_SILU = 1e-3  # of products up to 20
_HEADS, _HEAD_SIZE, _SCALE = 2, 24, 0.2
_ROUNDING = 0.04  # of a mean of values up to 2, of factors in bfloat16
_PERIOD = 4099
_ONE_THREAD = 1 << 18  # multiplications that OpenBLAS does not share

Array: TypeAlias = NDArray[Any]
Arrays: TypeAlias = Mapping[str, Array]
Expected: TypeAlias = Mapping[str, tuple[Array, float]]


class _Case(NamedTuple):
    """Some operators on the same inputs.

    Attributes:
        nodes: of the operators.
        types: of the inputs, by name.
        weights: constants by name.
        feed: the inputs of a number of rows.
        expected: of the inputs, what each output is and how far from it a value may be.
    """

    nodes: list[ProbeNode]
    types: Mapping[str, ValueType]
    weights: Arrays
    feed: Callable[[int], Arrays]
    expected: Callable[[Arrays], Expected]


def is_right(library: str) -> bool:
    """Whether the kernels give the known results: matmuls in both layouts, and quantized rows, to the bit."""
    matmuls = [of(*size) for size in _SIZES for of in (_matmuls_of_8_bits, _matmuls_of_4_bits)]
    all_cases = [*matmuls, _rows_of_branches(), _quantized_rows(), _rotated_rows(), _attention()]
    sessions = [
        _opened(library, cases, panels=panels)
        for cases, panels in ((all_cases, False), (matmuls, True))
    ]
    for rows in _ROWS:
        feeds = [case.feed(rows) for case in all_cases]
        fed = {name: array for feed in feeds for name, array in feed.items()}
        found = [_run(session, fed) for session in sessions]
        for case, feed in zip(all_cases, feeds, strict=True):
            for name, (expected, error) in case.expected(feed).items():
                results = [outputs[name] for outputs in found if name in outputs]
                if not all(_is_near(result, expected, error) for result in results):
                    return False
    return True


def _run(session: Any, fed: Arrays) -> Arrays:
    """All outputs of a session by name."""
    names = [value.name for value in session.get_outputs()]
    inputs = {value.name: fed[value.name] for value in session.get_inputs()}
    return dict(zip(names, session.run(names, inputs), strict=True))


def _is_near(found: Array, expected: Array, error: float) -> bool:
    if not error or found.shape != expected.shape:
        return np.array_equal(found, expected)
    return bool(np.abs(found - expected).max() < error)  # a NaN is not


def _opened(library: str, cases: list[_Case], *, panels: bool) -> Any:
    """A session of a model of all cases' nodes."""
    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 2
    options.enable_cpu_mem_arena = False  # of use from the second run of a size on
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4
    register(options, library, panels=panels)
    weights = {name: array for case in cases for name, array in case.weights.items()}
    if panels:
        matmuls = {node.inputs[1] for case in cases for node in case.nodes}
        weights |= {name: in_panels(weights[name]) for name in matmuls}
    model = model_of_nodes(
        [node for case in cases for node in case.nodes],
        inputs={name: of for case in cases for name, of in case.types.items()},
        weights=weights,
    )
    return open_session(model, options, ["CPUExecutionProvider"])


def _matmuls_of_8_bits(depth: int, columns: int) -> _Case:
    """Alone, with a value for each column added or subtracted, and each of them with a branch."""
    a, w, a_scale, w_scale, other, zero, y = (
        f"int8/{depth}/{name}" for name in ("a", "w", "a_scale", "w_scale", "other", "zero", "y")
    )
    weights: dict[str, Array] = {
        w: _integers(w, depth, columns),
        w_scale: _powers_of_2(columns) / 8,
        other: np.arange(columns, dtype=np.float32),
        zero: np.full(1, 128, np.uint8),
    }
    signs = {"": 0, "Add": 1, "Sub": -1}
    nodes = [
        ProbeNode(
            f"MatMulIntegerToFloat{how}",
            [a, w, a_scale, w_scale, *([other] if how else []), zero],
            {y + how: (FLOAT, columns)},
            "embedge" if how else "com.microsoft",
        )
        for how in signs
    ]
    branch = _branch(f"int8/{depth}", columns)
    nodes += [
        ProbeNode(
            f"MatMulIntegerToFloatBranch{how}",
            [a, w, a_scale, w_scale, *([other] if how else []), zero, *branch.inputs],
            {f"{y}{how}/branch": (FLOAT, columns)},
            "embedge",
        )
        for how in (signs if branch.inputs else [])
    ]

    def feed(rows: int) -> Arrays:
        return {
            **{a: _bytes(a, rows, depth), a_scale: _powers_of_2(rows)[:, None]},
            **branch.feed(rows),
        }

    def expected(fed: Arrays) -> Expected:
        product = _product(fed[a].astype(np.float32) - 128, weights[w].astype(np.float32))
        product *= weights[w_scale] * fed[a_scale]
        values = {y + how: product + sign * weights[other] for how, sign in signs.items()}
        return _and_branches(values, branch, fed)

    types: dict[str, ValueType] = {a: (UINT8, depth), a_scale: (FLOAT, 1), **branch.types}
    return _Case(nodes, types, {**weights, **branch.weights}, feed, expected)


def _matmuls_of_4_bits(depth: int, columns: int) -> _Case:
    """Of rows whose blocks have a largest value of 127 times a power of 2, so that they are integers."""
    depth = -(-depth // _BLOCK) * _BLOCK
    blocks = depth // _BLOCK
    a, w, scales, zeros, y = (f"int4/{depth}/{name}" for name in ("a", "w", "scales", "zeros", "y"))
    weights: dict[str, Array] = {
        w: _bytes(w, columns, blocks, _BLOCK // 2),
        scales: _powers_of_2(columns * blocks).reshape(columns, blocks) / 8,
        zeros: _bytes(zeros, columns, (blocks + 1) // 2),
    }
    attributes = {"K": depth, "N": columns, "bits": 4, "block_size": _BLOCK, "accuracy_level": 4}
    takes, branch = [a, w, scales, zeros], _branch(f"int4/{depth}", columns)
    nodes = [ProbeNode("MatMulNBits", takes, {y: (FLOAT, columns)}, "com.microsoft", attributes)]
    if branch.inputs:
        takes = takes + branch.inputs
        gives: Mapping[str, ValueType] = {f"{y}/branch": (FLOAT, columns)}
        nodes.append(ProbeNode("MatMulNBitsBranch", takes, gives, "embedge", attributes))
    values = _nibbles(weights[w]).astype(np.float32) - _nibbles(weights[zeros])[:, :blocks, None]
    values *= weights[scales][..., None]

    def feed(rows: int) -> Arrays:
        x = _floats(a, rows, blocks, _BLOCK)
        x[..., 5] = 127
        return {a: x.reshape(rows, depth) * _powers_of_2(rows)[:, None], **branch.feed(rows)}

    def expected(fed: Arrays) -> Expected:
        return _and_branches({y: _product(fed[a], values.reshape(columns, depth).T)}, branch, fed)

    types = {a: (FLOAT, depth), **branch.types}
    return _Case(nodes, types, {**weights, **branch.weights}, feed, expected)


class _Branch(NamedTuple):
    """What is added to a matmul's result.

    Attributes:
        inputs: of an operator, the last ones; none: there is no branch.
        types: of those that are no constants, by name.
        weights: the others.
        feed: rows of a number.
        product: what is added, of the rows.
    """

    inputs: list[str]
    types: Mapping[str, ValueType]
    weights: Arrays
    feed: Callable[[int], Arrays]
    product: Callable[[Arrays], Array]


def _branch(prefix: str, columns: int) -> _Branch:
    """A branch for so many columns, if they fill panels."""
    if columns % 16:
        return _Branch([], {}, {}, lambda rows: {}, lambda fed: np.zeros(0))
    values, scale, zero, up, up_scale = inputs = [
        f"{prefix}/branch/{name}" for name in ("values", "scale", "zero", "up", "up_scale")
    ]
    matrix = _integers(up, _RANK, columns) // 2
    weights: Arrays = {
        **{zero: np.full(1, 100, np.uint8), up: panels_of(matrix)},
        up_scale: _powers_of_2(columns)[::-1].copy(),
    }

    def feed(rows: int) -> Arrays:
        return {values: _bytes(values, rows, _RANK), scale: _powers_of_2(rows)[:, None]}

    def product(fed: Arrays) -> Array:
        whole = _product(fed[values].astype(np.float32) - 100, matrix.astype(np.float32))
        return np.asarray(whole * weights[up_scale] * fed[scale])

    types: Mapping[str, ValueType] = {values: (UINT8, _RANK), scale: (FLOAT, 1)}
    return _Branch(inputs, types, weights, feed, product)


def _and_branches(values: Arrays, branch: _Branch, fed: Arrays) -> Expected:
    """Exact results, and those with a branch, if there is one."""
    found: dict[str, tuple[Array, float]] = {name: (value, 0) for name, value in values.items()}
    if branch.inputs:
        added = branch.product(fed)
        found |= {f"{name}/branch": (value + added, 0) for name, value in values.items()}
    return found


def _rows_of_branches() -> _Case:
    """Rows times a matrix in panels, quantized."""
    down, down_scale = _integers("down", _WIDTH, _RANK) // 2, _powers_of_2(_RANK)
    weights: dict[str, Array] = {
        **{"branch/down": panels_of(down), "branch/down_scale": down_scale},
        **{"branch/zero": np.full(1, 100, np.uint8), "branch/step": np.array(_STEP)},
    }
    takes = [
        f"branch/{name}" for name in ("x", "scale", "zero", "down", "down_scale", "step", "zeros")
    ]
    gives: Mapping[str, ValueType] = {"branch/y": (UINT8, _RANK), "branch/y/scale": (FLOAT, 1)}
    node = ProbeNode("BranchRows", takes, gives, "embedge", {"width": _RANK})

    def feed(rows: int) -> Arrays:
        return {
            "branch/x": _bytes("branch/x", rows, _WIDTH),
            "branch/scale": _powers_of_2(rows)[:, None],
            "branch/zeros": 120 + _bytes("zero", rows, 1) % 16,
        }

    def expected(fed: Arrays) -> Expected:
        y = _product(fed["branch/x"].astype(np.float32) - 100, down.astype(np.float32))
        return _levels("branch/y", y * down_scale * fed["branch/scale"], fed["branch/zeros"])

    types: Mapping[str, ValueType] = {
        **{"branch/x": (UINT8, _WIDTH), "branch/scale": (FLOAT, 1), "branch/zeros": (UINT8, 1)}
    }
    return _Case([node], types, weights, feed, expected)


def _levels(name: str, x: Array, zeros: Array, floor: Array | None = None) -> Expected:
    """Rows as integers, by the largest of their values either way, or of those above a floor; and their scales."""
    peak = np.max(np.abs(x) if floor is None else x, axis=1, keepdims=True)
    scale = (peak if floor is None else np.maximum(peak, floor)) * _STEP
    values = (np.rint(x / scale) + zeros).clip(0, 255)
    return {name: (values, 0), f"{name}/scale": (scale, 0)}


def _quantized_rows() -> _Case:
    """By the largest of their values, either way, or above a floor."""
    floor = np.array(200, np.float32)
    nodes = [
        ProbeNode("QuantizeRows", ["x", "step", "zero"], _quantized("plain"), "embedge"),
        ProbeNode(
            "QuantizeRowsAbove", ["x", "floor", "step", "zero"], _quantized("above"), "embedge"
        ),
    ]

    def feed(rows: int) -> Arrays:
        x = _floats("x", rows, _WIDTH) * _powers_of_2(rows)[:, None]
        return {"x": x, "zero": 120 + _bytes("zero", rows, 1) % 16}

    def expected(fed: Arrays) -> Expected:
        x, zeros = fed["x"], fed["zero"]
        return {**_levels("plain", x, zeros), **_levels("above", x, zeros, floor)}

    types = {"x": (FLOAT, _WIDTH), "zero": (UINT8, 1)}
    return _Case(nodes, types, {"floor": floor, "step": np.array(_STEP)}, feed, expected)


def _rotated_rows() -> _Case:
    """Of products whose rotated sums are exact; and behind ``silu``, which is approximated."""
    blocks = np.array([0, 0, -1, _BLOCK_ROTATED], np.int64)
    rotation = _floats("rotation", _BLOCK_ROTATED, _BLOCK_ROTATED) % 5 / 4
    weights: dict[str, Array] = {
        **{"rotation": rotation, "blocks": blocks, "rotated/step": np.array(_STEP)}
    }
    takes = ["left", "right", *weights, "rotated/zero"]
    op_types = {"rotated": "QuantizeRotated", "silu": "QuantizeRotatedSwiGLU"}
    nodes = [
        ProbeNode(op_types[name] + how, takes, _quantized(name + how, bool(how)), "embedge")
        for name in op_types
        for how in ("", "AndProduct")
    ]

    def feed(rows: int) -> Arrays:
        left, right = (_floats(side, rows, _WIDTH) / 32 for side in ("left", "right"))
        return {"left": left, "right": right, "rotated/zero": 120 + _bytes("zero", rows, 1) % 16}

    def expected(fed: Arrays) -> Expected:
        left, right = fed["left"], fed["right"]
        values: dict[str, tuple[Array, float]] = {}
        for name, product in (
            ("rotated", left * right),
            ("silu", left / (1 + np.exp(-left)) * right),
        ):
            exact = name == "rotated"
            rotated = _product(product.reshape(-1, _BLOCK_ROTATED), rotation).reshape(product.shape)
            scale = np.abs(rotated).max(axis=1, keepdims=True) * _STEP
            levels = rotated / scale
            levels = (np.rint(levels) if exact else levels) + fed["rotated/zero"]
            for how in ("", "AndProduct"):
                values[name + how] = levels.clip(0, 255), 0 if exact else _LEVEL
                values[f"{name}{how}/scale"] = scale, 0 if exact else _SILU / 127
            values[f"{name}AndProduct/product"] = product, 0 if exact else _SILU
        return values

    types = {"left": (FLOAT, _WIDTH), "right": (FLOAT, _WIDTH), "rotated/zero": (UINT8, 1)}
    return _Case(nodes, types, weights, feed, expected)


def _attention() -> _Case:
    """Beside numpy's softmax: causal, of a text with padding, and of all tokens; the first two with shared keys."""
    heads = _HEADS * _HEAD_SIZE
    common = {"num_heads": _HEADS, "scale": _SCALE}
    shared = {**common, "kv_num_heads": 1}
    result: Mapping[str, ValueType] = {"y": (FLOAT, "tokens", heads)}
    nodes = [
        ProbeNode(
            "CausalAttention",
            ["q", "k1", "v1", "before", "total"],
            {"causal": result["y"]},
            "embedge",
            {**shared, "local_window_size": -1},
        ),
        ProbeNode(
            "PaddedAttention",
            ["q", "k1", "v1", "length"],
            {"padded": result["y"]},
            "embedge",
            shared,
        ),
        ProbeNode("FullAttention", ["q", "k", "v"], {"full": result["y"]}, "embedge", common),
    ]

    def feed(tokens: int) -> Arrays:
        q, v = (_floats(name, 1, tokens, heads) / 64 for name in "qv")
        k1 = _floats("k", 1, tokens, _HEAD_SIZE) / 64
        return {
            **{"q": q, "v": v, "k": np.tile(k1, _HEADS), "k1": k1, "v1": v[..., :_HEAD_SIZE]},
            "before": np.full(1, tokens - 1, np.int32),
            "total": np.full(1, tokens, np.int32),
            "length": np.full(1, -(-tokens * 3 // 4), np.int64),
        }

    def expected(fed: Arrays) -> Expected:
        q, v, k1, v1 = (_by_head(fed[name]) for name in ("q", "v", "k1", "v1"))
        length = int(fed["length"][0])
        weights = np.exp(_SCALE * _product(q, k1.swapaxes(1, 2)))
        full, padded = _means(weights, v), _means(weights[..., :length], v1[:, :length])
        weights *= np.tri(q.shape[1], dtype=np.float32)
        means = {"full": full, "padded": padded, "causal": _means(weights, v1)}
        return {name: (mean, _ROUNDING) for name, mean in means.items()}

    wide: ValueType = (FLOAT, "tokens", heads)
    narrow: ValueType = (FLOAT, "tokens", _HEAD_SIZE)
    types: Mapping[str, ValueType] = {
        **{"q": wide, "k": wide, "v": wide, "k1": narrow, "v1": narrow},
        **{"before": (INT32,), "total": (INT32,), "length": (INT64,)},
    }
    return _Case(nodes, types, {}, feed, expected)


def _quantized(name: str, and_product: bool = False) -> Mapping[str, ValueType]:
    """What an operator gives that quantizes rows."""
    outputs: dict[str, ValueType] = {name: (UINT8, _WIDTH), f"{name}/scale": (FLOAT, 1)}
    return outputs | ({f"{name}/product": (FLOAT, _WIDTH)} if and_product else {})


def _by_head(x: Array) -> Array:
    """``[heads, tokens, size]`` of ``[1, tokens, heads · size]``."""
    heads: Array = x[0].reshape(x.shape[1], -1, _HEAD_SIZE)
    return heads.swapaxes(0, 1)


def _means(weights: Array, values: Array) -> Array:
    """``[1, tokens, heads · size]`` of weights ``[heads, tokens, keys]`` and values ``[heads, keys, size]``."""
    means: Array = _product(weights, values) / weights.sum(axis=-1, keepdims=True)
    return means.swapaxes(0, 1).reshape(1, means.shape[1], -1)


def _product(left: Array, right: Array) -> Array:
    """``left @ right`` in parts so small that BLAS wakes no second thread, which takes longer than the product."""
    step = max(1, _ONE_THREAD // math.prod(right.shape[-2:]))
    parts = [left[..., i : i + step, :] @ right for i in range(0, left.shape[-2], step)]
    return np.concatenate(parts, axis=-2)


def _nibbles(pairs: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 ``[..., 2 · n]`` of ``[..., n]``, the low half of a byte first."""
    return np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*pairs.shape[:-1], -1)


def _bytes(name: str, *shape: int) -> NDArray[np.uint8]:
    """Numbers without a pattern, always the same for a name; numpy's generators take long to import.

    They repeat after a prime number, so that no two rows are alike.
    """
    drawn = hashlib.shake_128(name.encode()).digest(_PERIOD)
    return np.resize(np.frombuffer(drawn, np.uint8), shape)


def _integers(name: str, *shape: int) -> NDArray[np.int8]:
    """Of -127 to 127."""
    return np.maximum(_bytes(name, *shape).view(np.int8), -127)


def _floats(name: str, *shape: int) -> NDArray[np.float32]:
    """Whole ones of -127 to 127."""
    return _integers(name, *shape).astype(np.float32)


def _powers_of_2(count: int) -> NDArray[np.float32]:
    """1, 2, 4, 8, 1 ... so that products with them are exact."""
    return np.ldexp(np.ones(count, np.float32), np.arange(count) % 4)
