"""What is read of graphs: where tensors lie, and which of them are the weights of integer matmuls."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from embedge.runtime import BundleError
from embedge.runtime.bundle.graph_check import CheckedGraph, check_graph
from embedge.runtime.bundle.onnx_model import (
    FLOAT,
    INT8,
    INT64,
    UINT8,
    ExternalData,
    StoredTensor,
    read_model,
)
from embedge.runtime.host.probe_models import _message

INPUTS = {"a": (UINT8, 2), "x": (FLOAT, 2), "ids": (INT64, 2)}


def test_external_data_is_read_as_the_onnx_package_wrote_it(bundle: Any) -> None:
    data = (bundle.path / "fp32/retrieval.onnx").read_bytes()
    tensors = read_model(data).graph.initializers.values()
    assert [tensor.place for tensor in tensors if tensor.place is not None] == [
        ExternalData(location="shared.bin", offset=4096, length=bundle.table.nbytes),
        ExternalData(location="retrieval.bin", offset=4096, length=8 * 8 * 4),
    ]


def external(
    name: str, dims: Sequence[int], location: str, kind: int = INT8, **place: int
) -> TensorProto:
    """An initializer of bytes that lies in a file."""
    tensor = TensorProto(name=name, data_type=kind, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **place}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def matmul_graph(initializers: Sequence[TensorProto]) -> onnx.GraphProto:
    """A matmul with each of the weights ``w…``, and other readers of the others."""
    names = [tensor.name for tensor in initializers]
    matmul, domain = "MatMulIntegerToFloat", "com.microsoft"
    nodes = [
        helper.make_node(matmul, ["a", name, "s", "s"], [f"{name}y"], domain=domain)
        for name in names
        if name.startswith("w") and name != "w4"
    ]
    if "w4" in names:
        sizes: dict[str, Any] = {"K": 640, "N": 48, "bits": 4, "block_size": 128}
        nodes.append(
            helper.make_node("MatMulNBits", ["x", "w4", "s4"], ["y4"], domain=domain, **sizes)
        )
    if "rows" in names:
        nodes.append(helper.make_node("MatMul", ["x", "other"], [matmul]))
        nodes.append(helper.make_node("Gather", ["rows", "ids"], ["row"], name=matmul))
    inputs = [
        helper.make_tensor_value_info(n, kind, [None] * rank) for n, (kind, rank) in INPUTS.items()
    ]
    scales = [
        numpy_helper.from_array(np.array(1, np.float32), "s"),
        numpy_helper.from_array(np.ones((48, 5), np.float32), "s4"),
    ]
    return helper.make_graph(nodes, "matmuls", inputs, [], [*initializers, *scales])


def write_matmuls(path: Path, initializers: Sequence[TensorProto]) -> Path:
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(matmul_graph(initializers), opset_imports=opsets, ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def checked(file: Path) -> CheckedGraph:
    return check_graph(file, inputs=INPUTS, outputs={})


STORED = [
    external("other", (64, 64), "shared.bin", offset=4096, length=4096),
    external("w", (64, 300), "shared.bin", offset=8192, length=19200),
    numpy_helper.from_array(np.ones((64, 64), np.int8), "w_inline"),
    external("rows", (64, 64), "shared.bin", offset=4096, length=4096),
    external("w_made", (272, 128), "unpacked", offset=0, length=34816),
    external("w4", (48, 5, 64), "shared.bin", UINT8, offset=0, length=15360),
]
OF_MATMULS = {
    name: StoredTensor(kind, shape, ExternalData(location=location, offset=offset, length=length))
    for name, kind, shape, location, offset, length in (
        ("w", INT8, (64, 300), "shared.bin", 8192, 19200),
        ("w_made", INT8, (272, 128), "unpacked", 0, 34816),
        ("w4", UINT8, (48, 5, 64), "shared.bin", 0, 15360),
    )
}


def test_stored_weights_of_integer_matmuls_are_found(tmp_path: Path) -> None:
    graph = checked(write_matmuls(tmp_path / "matmuls.onnx", STORED))
    assert graph.matmul_weights == OF_MATMULS
    assert [tensor.dtype for tensor in graph.matmul_weights.values()] == ["int8", "int8", "uint8"]
    assert graph.made == {"w_made": OF_MATMULS["w_made"]}
    assert len(graph.places) == 4


def test_a_graph_without_integer_matmuls_has_none_of_their_weights(bundle: Any) -> None:
    from embedge.runtime.bundle.folder import Bundle

    assert Bundle(bundle.path).matmul_weights("fp32", "retrieval") == {}


def test_dimensions_may_be_packed(tmp_path: Path) -> None:
    tensor = STORED[1]
    entries = [(13, entry.SerializeToString()) for entry in tensor.external_data]
    kind = TensorProto(data_type=INT8, data_location=TensorProto.EXTERNAL).SerializeToString()
    packed = _message((1, b"\x40\xac\x02"), (8, b"w"), *entries) + kind
    assert list(TensorProto.FromString(packed).dims) == [64, 300]
    graph = matmul_graph([tensor])
    del graph.initializer[0]
    opset = helper.make_opsetid("com.microsoft", 1).SerializeToString()
    whole = _message((7, graph.SerializeToString() + _message((5, packed))), (8, opset))
    (tmp_path / "packed.onnx").write_bytes(whole)
    assert checked(tmp_path / "packed.onnx").matmul_weights == {"w": OF_MATMULS["w"]}


@pytest.mark.parametrize(
    ("weight", "problem"),
    [
        (
            external("w", (2, 3, 4), "shared.bin", offset=0, length=24),
            "has a weight without two dimensions",
        ),
        (
            external("w4", (64, 64), "shared.bin", UINT8, offset=0, length=4096),
            r"reads 'w4' of type 2 and the shape \[64, 64\]",
        ),
        (
            external("w", (0, 64), "shared.bin", offset=0, length=0),
            "has a weight without two dimensions",
        ),
        (
            external("w", (64, 300), "shared.bin", offset=0, length=19199),
            r"'w' of the shape \[64, 300\] has 19199 bytes, not 19200",
        ),
        (
            external("w", (96, 32), "task.bin", offset=4096),
            r"lies at \['location', 'offset'\], not at a location, offset and length",
        ),
        (
            numpy_helper.from_array(np.ones((65, 64), np.int8), "w"),
            "weight w of 4160 bytes lies in it, not beside it",
        ),
    ],
    ids=["no matrix", "no blocks", "empty", "of another size", "without end", "inside"],
)
def test_a_weight_that_is_not_as_expected_is_a_bundle_error(
    weight: TensorProto, problem: str, tmp_path: Path
) -> None:
    file = write_matmuls(tmp_path / "bad.onnx", [weight])
    with pytest.raises(
        BundleError, match=rf"bad\.onnx: not a graph that embedge runs: .*{problem}"
    ):
        checked(file)


@pytest.mark.slow
@pytest.mark.parametrize("of", ["task", "matmuls"])
def test_a_graph_file_cut_anywhere_fails_with_a_bundle_error_or_not_at_all(
    of: str, bundle: Any, tmp_path: Path
) -> None:
    file = bundle.path / "fp32/retrieval.onnx"
    if of == "matmuls":
        file = write_matmuls(tmp_path / "matmuls.onnx", STORED[:2] + STORED[3:])
    data = file.read_bytes()
    for length in range(0, len(data), 5 if of == "task" else 1):
        (tmp_path / "cut.onnx").write_bytes(data[:length])
        with contextlib.suppress(BundleError):
            checked(tmp_path / "cut.onnx")


def test_an_attribute_without_its_graph_is_refused(tmp_path: Path) -> None:
    branch = helper.make_graph([], "branch", [], [])
    node = helper.make_node("If", ["a"], ["y"], then_branch=branch, else_branch=branch)
    node.attribute[0].ClearField("g")
    graph = matmul_graph([])
    graph.node.append(node)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    (tmp_path / "if.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match="the attribute else_branch of If holds no graph"):
        checked(tmp_path / "if.onnx")
