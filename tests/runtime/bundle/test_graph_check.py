"""Graphs that `embedge export` could not have written are refused before ONNX Runtime gets them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer

from embedge.runtime import BundleError, Embedder, EmbedgeValueError
from embedge.runtime.bundle.folder import Bundle
from tests.helpers.files_of import file_entries

Change = Callable[[Any], object]


def changed(bundle: Any, change: Change) -> None:
    """Changes a bundle's graph in place, a message of ONNX."""
    file = bundle.path / "fp32/retrieval.onnx"
    model = onnx.load(file, load_external_data=False)
    change(model)
    file.write_bytes(model.SerializeToString())


def refusal(bundle: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """What embedding with a bundle is refused with, before a session is made."""

    def refuse(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("ONNX Runtime got the graph")

    monkeypatch.setattr("embedge.runtime.sessions.session.open_session", refuse)
    with pytest.raises(BundleError):
        Embedder(bundle.path, verify="none").encode("w1")
    with pytest.raises(BundleError) as caught:
        Bundle(bundle.path, verify="none").graph_files("fp32", "retrieval")
    assert "retrieval.onnx: not a graph that embedge runs: " in str(caught.value)
    assert "`embedge inspect --verify` checks the bundle's files" in str(caught.value)
    return str(caught.value)


def node(model: Any, op_type: str) -> Any:
    return next(n for n in model.graph.node if n.op_type == op_type)


def initializer(model: Any, name: str) -> Any:
    return next(t for t in model.graph.initializer if t.name == name)


def attribute(name: str, value: Any) -> Change:
    return lambda model: node(model, "ReduceSum").attribute.append(
        helper.make_attribute(name, value)
    )


def entry(key: str, value: str) -> Change:
    def change(model: Any) -> None:
        for item in initializer(model, "table").external_data:
            if item.key == key:
                item.value = value

    return change


def add(*nodes: Any) -> Change:
    return lambda model: model.graph.node.extend(nodes)


def branches(model: Any) -> None:
    """An ``If`` in the branch of an ``If``."""
    output = helper.make_tensor_value_info("b", TensorProto.FLOAT, ["batch", 8])
    inner = helper.make_graph(
        [helper.make_node("Identity", ["embedding"], ["b"])], "inner", [], [output]
    )
    for level in ("c", "d"):
        result = helper.make_tensor_value_info(level, TensorProto.FLOAT, ["batch", 8])
        choice = helper.make_node("If", ["yes"], [level], then_branch=inner, else_branch=inner)
        inner = helper.make_graph([choice], level, [], [result])
    model.graph.node.extend(inner.node)
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))


def function(name: str, inputs: int = 3, op_type: str = "Abs") -> Change:
    body = [helper.make_node(op_type, ["a"], ["values"]), helper.make_node("Abs", ["a"], ["scale"])]
    names = ["a", "b", "c", "d"][:inputs]
    opsets = [helper.make_opsetid("", 21)]
    made = helper.make_function(
        "embedge", name, names, ["values", "scale"], body, opsets, ["width"]
    )
    return lambda model: model.functions.append(made)


def products(*shapes: tuple[int, ...], **attributes: int) -> Change:
    """A 4-bit product with constants of some shapes."""
    names = ["packed", "scales", "zeros"][: len(shapes)]
    settings: dict[str, Any] = {
        "K": 8,
        "N": 6,
        "bits": 4,
        "block_size": 16,
        "accuracy_level": 4,
        **attributes,
    }
    made = helper.make_node(
        "MatMulNBits", ["embedded", *names], ["y"], domain="com.microsoft", **settings
    )

    def change(model: Any) -> None:
        model.graph.node.append(made)
        for name, shape in zip(names, shapes, strict=True):
            dtype = np.float32 if name == "scales" else np.uint8
            model.graph.initializer.append(numpy_helper.from_array(np.ones(shape, dtype), name))

    return change


CHANGES: list[tuple[str, Change, str]] = [
    (
        "another operator",
        lambda m: setattr(node(m, "Cast"), "op_type", "Loop"),
        "'Loop' of 'ONNX' is",
    ),
    ("another domain", lambda m: setattr(node(m, "Cast"), "domain", "x"), "'Cast' of 'x' is not"),
    (
        "a function's name",
        lambda m: setattr(node(m, "Cast"), "op_type", "QuantizeRows"),
        "of 'ONNX'",
    ),
    ("more inputs", lambda m: node(m, "Cast").input.append("table"), "2 inputs and 1 outputs"),
    ("more outputs", lambda m: node(m, "Cast").output.append("x"), "1 inputs and 2 outputs"),
    (
        "another attribute",
        attribute("noop_with_empty_axes", 1),
        "noop_with_empty_axes' of ReduceSum",
    ),
    ("an attribute twice", attribute("keepdims", 0), "keepdims twice"),
    (
        "beyond its range",
        lambda m: setattr(node(m, "ReduceSum").attribute[0], "i", 1 << 40),
        "keepdims of ReduceSum is 1099511627776",
    ),
    (
        "another type",
        lambda m: (
            node(m, "ReduceSum").attribute[0].CopyFrom(helper.make_attribute("keepdims", "a"))
        ),
        "keepdims of ReduceSum has another type",
    ),
    (
        "of no function",
        lambda m: setattr(node(m, "ReduceSum").attribute[0], "ref_attr_name", "x"),
        "keepdims of ReduceSum is that of no function",
    ),
    ("nothing needed", products((6, 1, 8), (6, 1), bits=8), "bits of MatMulNBits is 8"),
    ("blocks", products((6, 1, 8), (6, 1), block_size=0), "block_size of MatMulNBits is 0"),
    ("packed", products((6, 2, 8), (6, 1)), r"reads 'packed' of type 2 and the shape [6, 2, 8]"),
    ("scales", products((6, 1, 8), (5, 1)), r"reads 'scales' of type 1 and the shape [5, 1]"),
    ("zeros", products((6, 1, 8), (6, 1), (6, 2)), r"reads 'zeros' of type 2 and the shape [6, 2]"),
    ("columns", products((6, 1, 8), (6, 1), N=7), r"reads 'packed' of type 2"),
    (
        "no constant",
        add(
            helper.make_node(
                "MatMulIntegerToFloat",
                ["embedded", "embedded", "mask", "mask"],
                ["y"],
                domain="com.microsoft",
            )
        ),
        "reads 'embedded', which is no constant",
    ),
    (
        "a norm",
        add(helper.make_node("LayerNormalization", ["embedded", "table"], ["y"], axis=-1)),
        "has a weight of the shape [66, 8]",
    ),
    ("made twice", lambda m: m.graph.node.append(m.graph.node[0]), "'embedded' is made twice"),
    (
        "an input made",
        add(helper.make_node("Abs", ["sum"], ["input_ids"])),
        "'input_ids' is made twi",
    ),
    (
        "before it is made",
        lambda m: m.graph.node.insert(0, m.graph.node.pop()),
        "nothing makes before",
    ),
    (
        "made by nothing",
        lambda m: node(m, "Cast").input.__setitem__(0, "x"),
        "reads 'x', which noth",
    ),
    (
        "no output",
        lambda m: setattr(m.graph.output[0], "name", "x"),
        "nothing makes the output 'x'",
    ),
    ("a tensor twice", lambda m: m.graph.initializer.append(m.graph.initializer[0]), "made twice"),
    ("a size", lambda m: initializer(m, "last").dims.append(2), "[1, 2] has 8 bytes, not 16"),
    ("a large size", lambda m: initializer(m, "last").dims.append(1 << 40), "'last' has the shape"),
    (
        "a negative size",
        lambda m: initializer(m, "last").dims.append(-1),
        "'last' has the shape [1, -1",
    ),
    ("a type", lambda m: setattr(initializer(m, "last"), "data_type", 16), "unknown type 16"),
    ("strings", lambda m: setattr(initializer(m, "last"), "data_type", 8), "unknown type 8"),
    (
        "no bytes",
        lambda m: initializer(m, "last").ClearField("raw_data"),
        "neither in the graph nor",
    ),
    (
        "both",
        lambda m: setattr(initializer(m, "table"), "raw_data", b"1"),
        "neither in the graph nor",
    ),
    ("a length", entry("length", "1"), "has 1 bytes, not 2112"),
    ("a long length", entry("length", "1" * 19), "length '1111111111111111111'"),
    ("a sign", entry("offset", "-1"), "offset '-1'"),
    ("a key", entry("offset", ""), "offset ''"),
    ("no key", lambda m: initializer(m, "table").external_data.pop(), "not at a location, offset"),
    (
        "an input",
        lambda m: m.graph.input.pop(),
        "expected inputs attention_mask, input_ids, found input",
    ),
    (
        "a type of it",
        lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 6),
        "found 2 of 6",
    ),
    ("its rank", lambda m: m.graph.input[0].type.tensor_type.shape.dim.add(), "found 3 of 7"),
    (
        "an input's size",
        lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", -5),
        "a dimension of 'input_ids' is -5",
    ),
    (
        "the output's type",
        lambda m: setattr(m.graph.output[0].type.tensor_type, "elem_type", 7),
        "of 7",
    ),
    (
        "operators' version",
        lambda m: setattr(m.opset_import[0], "version", 99),
        "version 99 of the",
    ),
    (
        "operators' domain",
        lambda m: setattr(m.opset_import[0], "domain", "ai.onnx.ml"),
        "'ai.onnx.ml'",
    ),
    ("known shapes", lambda m: m.graph.value_info.append(m.graph.output[0]), "unknown field 13"),
    ("training", lambda m: m.training_info.add(), "the unknown field 20"),
    ("sparse", lambda m: m.graph.sparse_initializer.add(), "the unknown field 15"),
    ("branches", branches, "operator 'If' of 'ONNX' is not known"),
    ("a function", function("Strange"), "the function 'Strange' of 'embedge' is not known"),
    ("its inputs", function("QuantizeRows", 2), "the function QuantizeRows has other inputs"),
    ("its body", function("QuantizeRows", op_type="Loop"), "the operator 'Loop' of 'ONNX'"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"), [c[1:] for c in CHANGES], ids=[c[0] for c in CHANGES]
)
def test_a_graph_that_breaks_a_rule_is_refused(
    bundle: Any, monkeypatch: pytest.MonkeyPatch, change: Change, message: str
) -> None:
    changed(bundle, change)
    assert message in refusal(bundle, monkeypatch)


def test_what_passes_the_rules_runs(bundle: Any) -> None:
    expected = Embedder(bundle.path).encode("w1 w2")
    changed(bundle, products((6, 1, 8), (6, 1), (6, 1)))
    np.testing.assert_array_equal(Embedder(bundle.path, verify="none").encode("w1 w2"), expected)


@pytest.mark.parametrize(
    "data", [b"", b"\x08\x0b", b"\x3a\x05abc", b"\x0b\x0c" * 40, b"\xff" * 11, b"\x3a\x00\x3a\x00"]
)
def test_what_is_no_graph_is_refused(bundle: Any, data: bytes) -> None:
    (bundle.path / "fp32/retrieval.onnx").write_bytes(data)
    with pytest.raises(BundleError, match=r"retrieval\.onnx: (not a|empty)"):
        Embedder(bundle.path, verify="none").encode("w1")


def test_a_graph_is_looked_at_when_everything_is_verified(bundle: Any) -> None:
    changed(bundle, attribute("noop_with_empty_axes", 1))
    bundle.edit(lambda m: m.update(files=file_entries(bundle.path)))
    with pytest.raises(BundleError, match="not a graph that embedge runs"):
        Embedder(bundle.path, verify="full")


def test_results_of_another_shape_are_a_bundle_error(bundle: Any) -> None:
    changed(bundle, lambda m: m.graph.node[-1].input.__setitem__(0, "states"))
    with pytest.raises(BundleError, match=r"expected embedding of the shape \[1, 8\], found \["):
        Embedder(bundle.path, verify="none").encode("w1")


@pytest.mark.parametrize("texts", ["w1 new", ["w1", "w2 w3 w4", "w1 new"]])
def test_a_token_that_the_table_lacks_is_refused_by_its_text(bundle: Any, texts: Any) -> None:
    file = bundle.path / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_tokens(["new"])
    tokenizer.save(str(file))
    model = Embedder(bundle.path, verify="none")
    place = 0 if isinstance(texts, str) else 2
    with pytest.raises(EmbedgeValueError, match=rf"inputs\[{place}\] has 'new', .* has 66 rows"):
        model.encode(texts)
    assert model.encode("w1").shape == (8,)


def test_a_padding_token_that_the_table_lacks_is_left_out(bundle: Any) -> None:
    expected = Embedder(bundle.path).encode(["w1", "w2 w3"])
    bundle.edit(lambda m: m["tokenizer"].update(pad_token_id=1000))
    np.testing.assert_array_equal(Embedder(bundle.path).encode(["w1", "w2 w3"]), expected)
