"""A finished graph as an ONNX model."""

from __future__ import annotations

from collections.abc import Mapping

from onnx import ModelProto, TensorProto, helper

from embedge.export.graph.builder import Graph
from embedge.export.graph.fused_ops import functions_of
from embedge.export.graph.initializers import TensorSpec
from embedge.export.graph.ops import CONTRIB, DOMAIN, VERSION
from embedge.export.graph.scheme import Target
from embedge.runtime.bundle.contract import UNPACKED

OPSET = 24  # Attention's nonpad_kv_seqlen: right padding without a tokens × tokens mask
# ONNX Runtime takes a kernel without an end version for the version of its schema alone. Up to 20
# the CUDA provider has one for every operator used here; Identity lacks it from 21, Cos and Sin
# from 22, Cast, Shape and Reshape at 24 (tests/export/cuda_kernels.tsv).
CUDA_OPSET = 20
IR_VERSION = 11


def to_model(
    g: Graph, initializers: list[TensorProto], name: str, notes: Mapping[str, str]
) -> ModelProto:
    """Put a pruned graph and its initializers into an ONNX model."""
    constants = sorted(g.constants.values(), key=lambda c: c.name)
    unpacked = [_unpacked(spec) for u in g.unpacked.values() for spec in u.specs]
    by_task = [
        helper.make_tensor_value_info(spec.name, spec.elem_type, spec.shape)
        for initializer in g.task_tensors.values()
        for spec in initializer.specs
    ]
    opset = CUDA_OPSET if g.scheme.target is Target.CUDA else OPSET
    functions = functions_of(g.nodes, opset)
    graph = helper.make_graph(
        g.nodes,
        name,
        [*g.inputs, *by_task],
        g.outputs,
        initializer=[*constants, *initializers, *unpacked],
    )
    domains = {"": opset, CONTRIB: 1, **({DOMAIN: VERSION} if functions else {})}
    model = helper.make_model(
        graph,
        functions=functions,
        opset_imports=[helper.make_opsetid(*domain) for domain in domains.items()],
        ir_version=IR_VERSION,
        producer_name="embedge",
    )
    helper.set_model_props(model, dict(notes))
    return model


def _unpacked(spec: TensorSpec) -> TensorProto:
    """An initializer that the runtime gives when it opens the graph."""
    tensor = TensorProto(name=spec.name, data_type=spec.elem_type, dims=spec.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", UNPACKED), ("offset", "0"), ("length", str(spec.nbytes))):
        tensor.external_data.add(key=key, value=value)
    return tensor
