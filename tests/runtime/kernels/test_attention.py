"""embedge's kernels for attention: the definition, and ONNX Runtime's operators."""

from __future__ import annotations

import functools
import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from embedge.export.graph.fused_ops import functions_of
from embedge.export.graph.onnx_model import IR_VERSION, OPSET
from embedge.export.graph.ops import CONTRIB, DOMAIN, VERSION
from embedge.runtime.kernels.register import register
from tests.helpers.kernel import LIBRARY, with_each_instruction_set
from tests.helpers.sessions import open_graph, session_options

Array = NDArray[Any]
Heads = tuple[int, int]  # of queries, of keys and values

TOKENS = (1, 5, 16, 31, 32, 33, 95, 96, 97, 255, 256, 257, 600)
HEADS: tuple[Heads, ...] = ((1, 1), (4, 2), (9, 3), (16, 2))
SIZES = (8, 16, 24, 33, 64, 80, 128)
WINDOWS = (-1, 1, 7, 128, 260)
# Relative errors, at least twice those found: 4e-7, and 4e-3 of products of 8-bit mantissas. Processors
# without AVX512-BF16 take float32 for both.
BOUNDS = {"float32": 1e-6, "bfloat16": 1e-2}
each_variant = pytest.mark.parametrize("variant", BOUNDS)
WHOLE_HEADS = "expected three dimensions, the last one of whole heads"
DIFFER = "queries, keys and values differ in texts, tokens or the size of a head"


def open_session(
    variant: str = "bfloat16",
    heads: Heads = (4, 2),
    window: int = -1,
    scale: float = 0.25,
    threads: int = 1,
    function: bool = False,
) -> Any:
    """Of one node; variant ``"none"`` is ONNX Runtime alone, ``function`` a node that has a body too."""
    name, domain, inputs, outputs = "CausalAttention", DOMAIN, "q k v lengths total", ["y"]
    if variant == "none" and not function:
        name, domain, inputs = "GroupQueryAttention", CONTRIB, "q k v   lengths total"
        outputs += ["keys", "values"]
    node = helper.make_node(name, inputs.split(" "), outputs, domain=domain, scale=scale)
    sizes: dict[str, Any] = {
        "num_heads": heads[0],
        "kv_num_heads": heads[1],
        "local_window_size": window,
    }
    node.attribute.extend(helper.make_attribute(*size) for size in sizes.items())
    info = helper.make_tensor_value_info
    values = [info(name, TensorProto.FLOAT, None) for name in "qkv"]
    values += [info("lengths", TensorProto.INT32, [None]), info("total", TensorProto.INT32, [])]
    graph = helper.make_graph([node], "attention", values, [info("y", TensorProto.FLOAT, None)])
    domains = {"": OPSET, CONTRIB: 1, DOMAIN: VERSION}
    model = helper.make_model(
        graph,
        functions=functions_of([node], OPSET) if function else [],
        opset_imports=[helper.make_opsetid(*domain) for domain in domains.items()],
        ir_version=IR_VERSION,
    )
    return session_of(model, variant, threads)


def session_of(model: Any, variant: str, threads: int) -> Any:
    """With the kernels, unless the variant is ``"none"``."""
    options = session_options(own=variant != "none", threads=threads)
    if variant != "none":
        assert LIBRARY is not None
        options.add_session_config_entry("embedge.attention", variant)
        register(options, LIBRARY, panels=False)
    return open_graph(model, options)


def run(session: Any, operands: list[Array]) -> Array:
    texts, tokens = operands[0].shape[:2]
    lengths, total = np.full(texts, tokens - 1, np.int32), np.array(tokens, np.int32)
    inputs = dict(zip("qkv", operands, strict=True), lengths=lengths, total=total)
    return np.asarray(session.run(["y"], inputs)[0])


def drawn(texts: int, tokens: int, heads: Heads = (4, 2), size: int = 24) -> list[Array]:
    draw = np.random.default_rng((texts, tokens, *heads, size))
    shapes = [(texts, tokens, count * size) for count in (*heads, heads[1])]
    return [draw.standard_normal(shape, np.float32) for shape in shapes]


def exact(operands: list[Array], heads: Heads, window: int, scale: float = 0.25) -> Array:
    """Causal attention by its definition."""
    tokens = operands[0].shape[1]
    back = np.arange(tokens)[:, None] - np.arange(tokens)
    seen = (back >= 0) & (back < (window if window > 0 else tokens))
    return defined(operands, heads, seen, scale)


def defined(operands: list[Array], heads: Heads, seen: Array, scale: float) -> Array:
    """The definition in float64; ``seen`` is bool ``[texts or none, …, tokens or 1, tokens]``."""
    texts, tokens, width = operands[0].shape
    shape = (texts, tokens, -1, width // heads[0])
    q, k, v = (x.astype(float).reshape(shape).swapaxes(1, 2) for x in operands)
    k, v = (np.repeat(x, heads[0] // heads[1], 1) for x in (k, v))
    scores = np.where(seen, scale * (q @ k.swapaxes(2, 3)), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    y = weights @ v / weights.sum(-1, keepdims=True)
    return np.asarray(y.swapaxes(1, 2).reshape(texts, tokens, width))


@functools.lru_cache(
    maxsize=12
)  # of the cases of one number of tokens, which every instruction set runs in turn
def drawn_and_exact(
    texts: int, tokens: int, heads: Heads, size: int, window: int
) -> tuple[list[Array], Array]:
    operands = drawn(texts, tokens, heads, size)
    return operands, exact(operands, heads, window, size**-0.5)


def error(found: Array, expected: Array) -> float:
    assert found.shape == expected.shape
    return float(np.sqrt(np.square(found - expected).sum() / np.square(expected).sum()))


@pytest.mark.slow
@with_each_instruction_set
@pytest.mark.parametrize("tokens", TOKENS)
def test_attention_is_the_definitions(tokens: int) -> None:
    place = TOKENS.index(tokens)  # each number of tokens takes its share of what there is besides
    for window, heads, size in [*itertools.product(WINDOWS, HEADS, SIZES)][place :: len(TOKENS)]:
        texts, scale = min(1 + (size + place) % 3, 16 // heads[0]), size**-0.5
        operands, expected = drawn_and_exact(texts, tokens, heads, size, window)
        for (variant, bound), threads in itertools.product(BOUNDS.items(), (1, 2)):
            found = run(open_session(variant, heads, window, scale, threads), operands)
            case = (variant, threads, texts, window, heads, size)
            assert error(found, expected) < bound, case
            # no token is lost among many; each one's result may be small for its terms
            assert np.abs(found - expected).max() < 5 * bound, case


@with_each_instruction_set
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", HEADS)
def test_attention_is_that_of_onnx_runtime_but_for_rounding(heads: Heads, window: int) -> None:
    theirs = open_session("none", heads, window)
    for variant, bound in BOUNDS.items():
        own = open_session(variant, heads, window, threads=2)
        for texts, tokens in ((1, 1), (2, 33), (1, 300)):
            operands = drawn(texts, tokens, heads)
            assert error(run(own, operands), run(theirs, operands)) < bound, (variant, tokens)


@with_each_instruction_set
@each_variant
@pytest.mark.parametrize(("window", "size"), [(-1, 24), (-1, 33), (7, 64), (128, 33)])
def test_a_row_has_the_same_bits_whatever_comes_after_it_and_in_any_batch(
    variant: str, window: int, size: int
) -> None:
    session = open_session(variant, window=window, threads=2)
    operands = drawn(3, 300, size=size)
    together = run(session, operands)
    for text in range(3):
        assert np.array_equal(run(session, [x[[text]] for x in operands])[0], together[text])
    for tokens in (1, 2, 11, 12, 13, 31, 33, 96, 97, 255, 257):
        cut = run(session, [x[1:, :tokens] for x in operands])
        assert np.array_equal(cut, together[1:, :tokens])
        others = [np.hstack([x[:, :tokens], -1e4 * x[:, tokens:]]) for x in operands]
        assert np.array_equal(run(session, others)[:, :tokens], together[:, :tokens])


@with_each_instruction_set
@each_variant
@pytest.mark.parametrize("window", [-1, 7])
@pytest.mark.parametrize("spread", [False, True])
def test_large_scores_do_not_overflow(spread: bool, window: int, variant: str) -> None:
    """Of single products, which rounding to bfloat16 leaves in their order: some 1e4, or up to 2^100."""
    draw = np.random.default_rng(5)
    q, k, v = drawn(1, 300, size=16)
    q[:], k[:] = 0, 0
    q[..., ::16] = draw.choice([-4, 4] if spread else [-5000, 5000], (1, 300, 4))
    k[..., ::16] = draw.integers(-8, 9, (1, 300, 2))
    if spread:
        k[..., ::16] = np.sign(k[..., ::16]) * 2.0 ** draw.integers(-100, 101, (1, 300, 2))
    expected = exact([q, k, v], (4, 2), window)
    assert error(run(open_session(variant, window=window), [q, k, v]), expected) < BOUNDS[variant]


@with_each_instruction_set
@each_variant
@pytest.mark.parametrize(("query", "key"), [(0, None), (None, 0), (1e3, 1e3), (-1e15, 1e15)])
def test_equal_scores_give_the_mean_of_the_values_seen(query: Any, key: Any, variant: str) -> None:
    operands = drawn(2, 300, (2, 2))
    for x, value in zip(operands, (query, key), strict=False):
        x[:] = x if value is None else value
    expected = np.cumsum(operands[2], 1, float) / np.arange(1, 301)[:, None]
    assert error(run(open_session(variant, (2, 2)), operands), expected) < BOUNDS[variant]


@with_each_instruction_set
@each_variant
@pytest.mark.parametrize("window", [-1, 7])
def test_a_query_with_a_nan_makes_its_row_nan_alone(window: int, variant: str) -> None:
    session, operands = open_session(variant, window=window), drawn(2, 150)
    expected = run(session, operands)
    operands[0][1, 100, 30] = np.nan  # of the second head
    expected[1, 100, 24:48] = np.nan
    assert np.array_equal(run(session, operands), expected, equal_nan=True)


@with_each_instruction_set
@each_variant
@pytest.mark.parametrize(("texts", "tokens"), [(0, 5), (3, 0), (0, 0)])
def test_no_texts_and_no_tokens_have_no_results(texts: int, tokens: int, variant: str) -> None:
    found = run(open_session(variant), drawn(texts, tokens))
    assert found.shape == (texts, tokens, 96) and found.dtype == np.float32


@with_each_instruction_set
@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(1, 3, 30), (1, 3, 16), (1, 3, 16)], WHOLE_HEADS),
        ([(3, 32), (3, 16), (3, 16)], WHOLE_HEADS),
        ([(1, 3, 32), (1, 3, 16), (1, 3, 2, 8)], WHOLE_HEADS),
        ([(1, 3, 32), (1, 3, 32), (1, 3, 32)], DIFFER),
        ([(1, 3, 32), (1, 3, 16), (1, 3, 8)], DIFFER),
        ([(1, 3, 32), (1, 4, 16), (1, 4, 16)], DIFFER),
        ([(2, 3, 32), (2, 3, 16), (1, 3, 16)], DIFFER),
    ],
)
def test_inputs_that_do_not_fit_are_refused(shapes: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(Exception, match=f"embedge attention: {message}"):
        run(open_session(), [np.ones(shape, np.float32) for shape in shapes])


@with_each_instruction_set
@pytest.mark.parametrize("heads", [(4, 3), (2, 4), (4, 0), (0, 1)])
def test_heads_that_do_not_divide_are_refused(heads: Heads) -> None:
    with pytest.raises(Exception, match="attention: the heads are no multiple of those of keys"):
        open_session(heads=heads)


@with_each_instruction_set
@each_variant
@pytest.mark.parametrize("threads", [1, 2])
def test_one_session_may_run_in_several_threads(threads: int, variant: str) -> None:
    session = open_session(variant, threads=threads)
    inputs = [drawn(1 + number % 2, 1 + 13 * number) for number in range(20)]
    expected = [run(session, operands) for operands in inputs]
    with ThreadPoolExecutor(4) as executor:
        found = list(executor.map(lambda operands: run(session, operands), inputs * 3))
    assert all(map(np.array_equal, found, expected * 3))


@pytest.mark.parametrize("window", [-1, 7])
def test_the_function_is_onnx_runtimes_attention_without_the_kernel(window: int) -> None:
    operands = drawn(2, 100)
    expected = run(open_session("none", window=window), operands)
    inlined = run(open_session("none", window=window, function=True), operands)
    assert np.array_equal(inlined, expected)
    for variant, bound in BOUNDS.items() if LIBRARY else ():
        found = run(open_session(variant, window=window, function=True), operands)
        assert np.array_equal(found, run(open_session(variant, window=window), operands))
        assert error(found, expected) < bound


def open_encoder(variant: str, kind: str, heads: Heads, scale: float, threads: int = 1) -> Any:
    """Of one node that has a body; kinds: ``"PaddedAttention"`` and ``"FullAttention"``."""
    padded = kind == "PaddedAttention"
    inputs = ["q", "k", "v", "lengths"] if padded else ["q", "k", "v"]
    sizes: dict[str, Any] = {
        "num_heads": heads[0],
        **({"kv_num_heads": heads[1]} if padded else {}),
    }
    node = helper.make_node(kind, inputs, ["y"], domain=DOMAIN, scale=scale, **sizes)
    info = helper.make_tensor_value_info
    values = [info(name, TensorProto.FLOAT, None) for name in "qkv"]
    values += [info("lengths", TensorProto.INT64, [None])] if padded else []
    graph = helper.make_graph([node], "attention", values, [info("y", TensorProto.FLOAT, None)])
    domains = {"": OPSET, CONTRIB: 1, DOMAIN: VERSION}
    model = helper.make_model(
        graph,
        functions=functions_of([node], OPSET),
        opset_imports=[helper.make_opsetid(*domain) for domain in domains.items()],
        ir_version=IR_VERSION,
    )
    return session_of(model, variant, threads)


def run_encoder(session: Any, operands: list[Array], lengths: Array) -> Array:
    given = dict(zip("qkv", operands, strict=True), lengths=lengths)
    names = [value.name for value in session.get_inputs()]
    return np.asarray(session.run(["y"], {name: given[name] for name in names})[0])


@pytest.mark.slow
@pytest.mark.parametrize("tokens", TOKENS)
def test_an_encoders_attention_is_the_definitions(tokens: int) -> None:
    """Without the kernels, ONNX Runtime's operator, which the function stands for."""
    for heads, size in (((2, 2), 32), ((4, 2), 24), ((3, 3), 80)):
        operands = drawn(3, tokens, heads, size)
        draw = np.random.default_rng(tokens)
        for kind in (
            ("PaddedAttention", "FullAttention") if heads[0] == heads[1] else ("PaddedAttention",)
        ):
            lengths = np.full(3, tokens)
            if kind == "PaddedAttention":
                lengths[1:] = draw.integers(1, tokens + 1, 2)
            seen = np.arange(tokens) < lengths[:, None, None, None]
            expected = defined(operands, heads, seen, size**-0.5)
            for variant in ("none", *(BOUNDS if LIBRARY else ())):
                session = open_encoder(variant, kind, heads, size**-0.5, threads=2)
                found = run_encoder(session, operands, lengths)
                assert error(found, expected) < BOUNDS.get(variant, 1e-6), (variant, kind, heads)


@with_each_instruction_set
@each_variant
@pytest.mark.parametrize("size", [24, 33, 64])
def test_padding_changes_no_bit_of_a_row(variant: str, size: int) -> None:
    session = open_encoder(variant, "PaddedAttention", (4, 2), 0.25, threads=2)
    operands = drawn(3, 300, size=size)
    for length in (1, 2, 31, 32, 33, 97, 255, 257, 300):
        lengths = np.array([300, length, 7])
        found = run_encoder(session, operands, lengths)
        alone = run_encoder(session, [x[1:2, :length] for x in operands], lengths[1:2])
        assert np.array_equal(found[1, :length], alone[0])
        spoilt = [x.copy() for x in operands]
        for x in spoilt:
            x[1, length:] = 1e4
        again = run_encoder(session, spoilt, lengths)
        assert np.array_equal(again[1, :length], alone[0])
        assert np.array_equal(again[[0, 2]], found[[0, 2]])


@with_each_instruction_set
def test_a_text_without_tokens_has_zeros_and_its_length_is_needed() -> None:
    session = open_encoder("bfloat16", "PaddedAttention", (4, 2), 0.25)
    found = run_encoder(session, drawn(2, 20), np.array([20, 0]))
    assert not found[1].any() and found[0].all()
    with pytest.raises(Exception, match="embedge attention: expected a length for each text"):
        run_encoder(session, drawn(2, 20), np.array([20]))
