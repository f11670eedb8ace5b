from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from embedge.runtime import BundleError, Embedder, EmbedgeError, ManifestError
from embedge.runtime.bundle.folder import Bundle
from embedge.runtime.bundle.onnx_reader import (
    ExternalData,
    StoredWeight,
    read_external_data,
    read_product_weights,
)
from embedge.runtime.cli.main import main
from embedge.runtime.host.probe_models import _message
from embedge.runtime.sessions.session import SessionConfig, open_graph

EVERY_FILE = [
    "tokenizer.json",
    "fp32/retrieval.onnx",
    "fp32/retrieval.bin",
    "fp32/shared.bin",
    "fp32/retrieval.layers.json",
]


@pytest.mark.parametrize("name", EVERY_FILE)
def test_a_missing_file_is_named(bundle: Any, name: str) -> None:
    (bundle.path / name).unlink()
    with pytest.raises(BundleError, match=rf"{name}: missing"):
        Embedder(bundle.path)


@pytest.mark.parametrize("name", EVERY_FILE)
def test_a_truncated_file_is_named_with_both_sizes(bundle: Any, name: str) -> None:
    file = bundle.path / name
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(BundleError, match=rf"{name}: expected {size} bytes, found {size - 3}"):
        Embedder(bundle.path)


def test_a_flipped_byte_is_found_by_the_full_check_only(bundle: Any) -> None:
    file = bundle.path / "fp32/shared.bin"
    data = bytearray(file.read_bytes())
    data[5000] ^= 1
    file.write_bytes(bytes(data))
    expected = bundle.manifest()["files"]["fp32/shared.bin"]["sha256"]
    Embedder(bundle.path)
    with pytest.raises(BundleError, match=rf"shared\.bin: expected SHA-256 {expected}, found "):
        Embedder(bundle.path, verify="full")


def test_weights_that_the_manifest_does_not_list_are_found_by_the_full_check(
    bundle: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle.edit(lambda document: document["files"].pop("fp32/shared.bin"))
    message = (
        "fp32/retrieval.onnx: uses weights in fp32/shared.bin, which the manifest does not list"
    )
    with pytest.raises(BundleError, match=message):
        Embedder(bundle.path, verify="full")
    assert main(["inspect", str(bundle.path), "--verify"]) == 1
    assert message in capsys.readouterr().err


def test_a_whole_bundle_passes_the_full_check(bundle: Any) -> None:
    Embedder(bundle.path, verify="full")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "expected a JSON object, found list"),
        ("{}", "format_version: missing"),
        ("\xff\xfe", "not valid JSON"),
        ('{"a":' * 65 + "1" + "}" * 65, "not valid JSON .nested deeper than 64 levels"),
        ('{"a": 1, "a": 2}', "not valid JSON .the key 'a' occurs twice"),
        ('{"a": ' + "9" * 301 + "}", "not valid JSON .a number of 301 digits"),
    ],
    ids=["cut", "empty", "deep", "list", "object", "not text", "nested", "twice", "digits"],
)
def test_a_broken_manifest_is_named(bundle: Any, text: str, message: str) -> None:
    (bundle.path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BundleError, match=rf"manifest\.json: {message}"):
        Embedder(bundle.path)


def test_a_newer_major_version_is_refused(bundle: Any) -> None:
    bundle.edit(lambda m: m.update(format_version="2.0"))
    with pytest.raises(ManifestError, match=r"this embedge reads version 1\.x"):
        Embedder(bundle.path)


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        BundleError, match="found nothing there; name the folder that `embedge export`"
    ):
        Embedder(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"not an embedge bundle: it has no manifest\.json"):
        Embedder(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match="expected a bundle's folder, found a file"):
        Embedder(tmp_path / "file")


def test_a_link_that_leaves_the_bundle_is_refused(bundle: Any, tmp_path: Path) -> None:
    file = bundle.path / "fp32/shared.bin"
    outside = tmp_path / "outside.bin"
    shutil.move(file, outside)
    file.symlink_to(outside)
    for verify in ("none", "size"):
        with pytest.raises(BundleError, match=r"shared\.bin: a link that leaves the bundle"):
            Embedder(bundle.path, verify=verify).encode("w1")


def test_a_link_inside_the_bundle_is_fine(bundle: Any) -> None:
    file = bundle.path / "fp32/retrieval.layers.json"
    shutil.move(file, bundle.path / "fp32/moved.json")
    file.symlink_to("moved.json")
    Embedder(bundle.path, verify="full")


def test_a_bundle_opened_through_a_link_is_fine(bundle: Any, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle.path)
    assert Embedder(tmp_path / "link").encode("w1").shape == (8,)


def move_weights(graph: Path, location: str) -> None:
    """Makes a graph use another file for its task's matrix."""
    model = onnx.load(graph, load_external_data=False)
    for entry in model.graph.initializer[1].external_data:
        if entry.key == "location":
            entry.value = location
    graph.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("absolute", [False, True], ids=["..", "absolute"])
def test_weights_outside_the_bundle_are_refused(
    bundle: Any, tmp_path: Path, absolute: bool
) -> None:
    outside = tmp_path / "outside.bin"
    shutil.copy(bundle.path / "fp32/retrieval.bin", outside)
    move_weights(
        bundle.path / "fp32/retrieval.onnx", str(outside) if absolute else "../../outside.bin"
    )
    with pytest.raises(
        BundleError,
        match=r"retrieval\.onnx: not a graph that embedge runs: an initializer lies at .*outside the bundle",
    ):
        Embedder(bundle.path, verify="none").encode("w1")


def test_without_checks_missing_weights_are_still_a_bundle_error(bundle: Any) -> None:
    (bundle.path / "fp32/retrieval.bin").unlink()
    with pytest.raises(BundleError, match=r"retrieval\.bin: missing"):
        Embedder(bundle.path, verify="none").encode("w1")


def test_a_graph_that_is_no_graph_is_a_bundle_error(bundle: Any) -> None:
    (bundle.path / "fp32/retrieval.onnx").write_bytes(b"\x3a\xff\xff not a model")
    with pytest.raises(
        BundleError,
        match=r"retrieval\.onnx: not a graph that embedge runs: a field at byte 4 is longer",
    ):
        Embedder(bundle.path, verify="none").encode("w1")


def test_what_onnx_runtime_refuses_is_a_bundle_error(
    bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = bundle.path / "fp32/retrieval.onnx"
    shutil.copy(bundle.path / "fp32/retrieval.bin", tmp_path / "outside.bin")
    move_weights(graph, "../../outside.bin")
    opened = Bundle(bundle.path, verify="none")
    monkeypatch.setattr(opened, "graph_files", lambda *_: [])  # as if its own checks let it pass
    with pytest.raises(BundleError, match=r"retrieval\.onnx: ONNX Runtime .* cannot open it"):
        open_graph(opened, "fp32", "retrieval", SessionConfig(threads=1))


@pytest.mark.parametrize("text", ["{}", "not JSON"])
def test_a_broken_tokenizer_is_a_bundle_error(bundle: Any, text: str) -> None:
    (bundle.path / "tokenizer.json").write_text(text)
    with pytest.raises(BundleError, match=r"tokenizer\.json: not a tokenizer that cuts at 16"):
        Embedder(bundle.path, verify="none")


def test_a_limit_without_room_for_special_tokens_is_a_bundle_error(bundle: Any) -> None:
    bundle.edit(lambda m: m["model"].update(max_length=1))
    with pytest.raises(EmbedgeError, match="special tokens leave no room"):
        Embedder(bundle.path)


def test_external_data_is_read_as_the_onnx_package_wrote_it(bundle: Any) -> None:
    assert read_external_data(bundle.path / "fp32/retrieval.onnx") == [
        ExternalData(location="shared.bin", offset=4096, length=bundle.table.nbytes),
        ExternalData(location="retrieval.bin", offset=4096, length=8 * 8 * 4),
    ]


def external(name: str, dims: Sequence[int], location: str, **place: int) -> TensorProto:
    """An int8 initializer that lies in a file."""
    tensor = TensorProto(
        name=name, data_type=TensorProto.INT8, dims=dims, data_location=TensorProto.EXTERNAL
    )
    for key, value in {"location": location, **place}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def products_graph(initializers: Sequence[TensorProto]) -> onnx.GraphProto:
    """A product with each of the weights ``w…``, and other readers of the others."""
    product = "MatMulIntegerToFloat"
    nodes = [
        helper.make_node(product, ["a", t.name, "s", "s"], [f"{t.name}y"], domain="com.microsoft")
        for t in initializers
        if t.name.startswith("w")
    ]
    nodes.append(helper.make_node("MatMulInteger", ["a", "other"], [product]))
    nodes.append(helper.make_node("MatMulNBits", ["x", "w4", "s"], ["y4"], domain="com.microsoft"))
    nodes.append(helper.make_node("Gather", ["rows", "ids"], ["row"], name=product))
    return helper.make_graph(nodes, "products", [], [], initializers)


def write_products(path: Path, initializers: Sequence[TensorProto]) -> Path:
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(products_graph(initializers), opset_imports=opsets, ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


STORED = [
    external("other", (64, 64), "shared.bin", offset=4096, length=4096),
    external("w", (64, 300), "shared.bin", offset=8192, length=19200),
    numpy_helper.from_array(np.ones((64, 64), np.int8), "w_inline"),
    external("rows", (64, 64), "shared.bin", offset=4096, length=4096),
    external("w_end", (96, 32), "task.bin", offset=4096),
    external("w_made", (272, 128), "unpacked", length=34816),
    external("w4", (48, 5, 64), "shared.bin", length=15360),
]
OF_PRODUCTS = {
    "w": StoredWeight(
        shape=(64, 300),
        dtype="int8",
        data=ExternalData(location="shared.bin", offset=8192, length=19200),
    ),
    "w_end": StoredWeight(
        shape=(96, 32),
        dtype="int8",
        data=ExternalData(location="task.bin", offset=4096, length=None),
    ),
    "w_made": StoredWeight(
        shape=(272, 128),
        dtype="int8",
        data=ExternalData(location="unpacked", offset=0, length=34816),
    ),
    "w4": StoredWeight(
        shape=(48, 5, 64),
        dtype="uint8",
        data=ExternalData(location="shared.bin", offset=0, length=15360),
    ),
}


def test_stored_weights_of_8_bit_products_are_found(tmp_path: Path) -> None:
    file = write_products(tmp_path / "products.onnx", STORED)
    assert read_product_weights(file) == OF_PRODUCTS
    assert len(read_external_data(file)) == 6


def test_a_graph_without_8_bit_products_has_none_of_their_weights(bundle: Any) -> None:
    assert read_product_weights(bundle.path / "fp32/retrieval.onnx") == {}


def test_dimensions_may_be_packed(tmp_path: Path) -> None:
    tensor = STORED[1]
    entries = [(13, entry.SerializeToString()) for entry in tensor.external_data]
    packed = _message((1, b"\x40\xac\x02"), (8, b"w"), *entries)
    assert list(TensorProto.FromString(packed).dims) == [64, 300]
    graph = products_graph([tensor])
    graph.ClearField("initializer")
    whole = _message((7, graph.SerializeToString() + _message((5, packed))))
    (tmp_path / "packed.onnx").write_bytes(whole)
    assert read_product_weights(tmp_path / "packed.onnx") == {"w": OF_PRODUCTS["w"]}


@pytest.mark.parametrize(
    ("weight", "problem"),
    [
        (external("w", (2, 3, 4), "shared.bin"), r"weight w has the shape \[2, 3, 4\]"),
        (external("w4", (64, 64), "shared.bin"), r"weight w4 has the shape \[64, 64\]"),
        (external("w", (0, 64), "shared.bin"), r"weight w has the shape \[0, 64\]"),
        (external("w", (64, 300), "shared.bin", length=19199), "expected 19200 bytes, found 19199"),
        (
            numpy_helper.from_array(np.ones((65, 64), np.int8), "w"),
            "weight w of 4160 bytes lies in it, not beside it",
        ),
    ],
    ids=["no matrix", "no blocks", "empty", "of another size", "inside"],
)
def test_a_weight_that_is_not_as_expected_is_a_bundle_error(
    weight: TensorProto, problem: str, tmp_path: Path
) -> None:
    file = write_products(tmp_path / "bad.onnx", [weight])
    with pytest.raises(BundleError, match=rf"bad\.onnx: not a readable ONNX model \(.*{problem}"):
        read_product_weights(file)


def test_the_estimate_counts_the_graph_and_the_bytes_it_uses(bundle: Any) -> None:
    graph = bundle.path / "fp32/retrieval.onnx"
    expected = graph.stat().st_size + bundle.table.nbytes + 8 * 8 * 4
    assert Bundle(bundle.path).graph_bytes("fp32", "retrieval") == expected


def test_weights_past_the_end_of_their_file_are_named_by_the_estimate(bundle: Any) -> None:
    file = bundle.path / "fp32/retrieval.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"retrieval\.bin: truncated: retrieval\.onnx uses bytes"):
        Bundle(bundle.path, verify="none").graph_bytes("fp32", "retrieval")


def test_a_graph_file_cut_anywhere_fails_with_a_bundle_error_or_not_at_all(
    bundle: Any, tmp_path: Path
) -> None:
    data = (bundle.path / "fp32/retrieval.onnx").read_bytes()
    for length in range(0, len(data), 5):
        (tmp_path / "cut.onnx").write_bytes(data[:length])
        with contextlib.suppress(BundleError):
            read_external_data(tmp_path / "cut.onnx")


def test_a_graph_of_products_cut_anywhere_fails_with_a_bundle_error_or_not_at_all(
    tmp_path: Path,
) -> None:
    data = write_products(tmp_path / "products.onnx", STORED[:2] + STORED[3:]).read_bytes()
    for length in range(len(data)):
        (tmp_path / "cut.onnx").write_bytes(data[:length])
        with contextlib.suppress(BundleError):
            read_product_weights(tmp_path / "cut.onnx")


def test_problems_lists_every_damaged_file(bundle: Any) -> None:
    (bundle.path / "fp32/shared.bin").write_bytes(b"short")
    (bundle.path / "tokenizer.json").unlink()
    problems = Bundle(bundle.path, verify="none").problems(hashes=False)
    assert len(problems) == 2
    assert "shared.bin: expected" in problems[0]
    assert "tokenizer.json: missing" in problems[1]
