"""ONNX Runtime's own quantizers on an fp32 export: dynamic int8, plain and after its optimizer, and 4 bits.

Two at the defaults that users get, int8 weights and uint8 activations per tensor; and, because that
costs a small encoder 5 % of its cosine, one with weights per channel. The 4 bits are those of ``q4`` files on
the hub: ``MatMulNBits`` in blocks of 32, rounded to nearest, the token table left in float32.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from embedge.bench.peers.context import PeerContext
from embedge.bench.peers.hidden_state import HiddenStateSystem, graph_inputs
from embedge.bench.systems.tokens import Ids
from embedge.runtime.host.onnxruntime import load_onnxruntime, open_session

__all__ = [
    "blockwise_int4",
    "floating_point",
    "optimized_int8",
    "per_channel_int8",
    "plain_int8",
]

# Families whose graphs ONNX Runtime's optimizer fuses, under the name it knows them by.
_OPTIMIZER_TYPES = dict.fromkeys(
    ("bert", "roberta", "xlm-roberta", "camembert", "mpnet", "distilbert", "electra"), "bert"
)
_DATA = "ort-q4.onnx.data"
_FLOAT = 1  # onnx.TensorProto.FLOAT; the fused operators have no type inference of their own


def floating_point(context: PeerContext) -> HiddenStateSystem:
    """Return the export as it is."""
    return _system("ORT fp32", context.onnx(), context)


def blockwise_int4(context: PeerContext) -> HiddenStateSystem:
    """Return the export with ``MatMulNBits`` in place of its matmuls."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    graph = context.workdir / "ort-q4.onnx"
    quantizer = MatMulNBitsQuantizer(onnx.load(context.onnx()), block_size=32, is_symmetric=True)
    logging.disable(logging.INFO)
    try:
        quantizer.process()
    finally:
        logging.disable(logging.NOTSET)
    onnx.save_model(quantizer.model.model, graph, save_as_external_data=True, location=_DATA)
    return _system("ORT q4", graph, context)


def plain_int8(context: PeerContext) -> HiddenStateSystem:
    """Return ``quantize_dynamic`` of the export."""
    graph = context.workdir / "ort-int8.onnx"
    _quantize(context.onnx(), graph)
    return _system("ORT dynamic int8", graph, context)


def optimized_int8(context: PeerContext) -> HiddenStateSystem:
    """Return ``quantize_dynamic`` of the export after ``onnxruntime.transformers.optimizer``.

    Raises:
        ValueError: the optimizer does not know the family.
    """
    if not _has_fusions(context):
        family = context.config.model_type
        raise ValueError(f"ONNX Runtime's optimizer has no fusions for {family}")
    graph = context.workdir / "ort-fused-int8.onnx"
    _quantize(_fused(context), graph)
    return _system("ORT optimizer + dynamic int8", graph, context)


def per_channel_int8(context: PeerContext) -> HiddenStateSystem:
    """Return the same with a scale per output channel of each weight, ONNX Runtime's most exact.

    Without the optimizer where that does not know the family.
    """
    graph = context.workdir / "ort-per-channel-int8.onnx"
    fusions = _has_fusions(context)
    _quantize(_fused(context) if fusions else context.onnx(), graph, per_channel=True)
    name = "ORT optimizer + per-channel int8" if fusions else "ORT per-channel int8"
    return _system(name, graph, context)


def _has_fusions(context: PeerContext) -> bool:
    return context.config.model_type in _OPTIMIZER_TYPES


def _fused(context: PeerContext) -> Path:
    """Return the fp32 export after the optimizer, made on the first call."""
    from onnxruntime.transformers import optimizer

    config, graph = context.config, context.workdir / "ort-fused.onnx"
    if not graph.exists():
        optimizer.optimize_model(
            str(context.onnx()),
            model_type=_OPTIMIZER_TYPES[config.model_type],
            num_heads=config.num_attention_heads,
            hidden_size=config.hidden_size,
        ).save_model_to_file(str(graph))
    return graph


def _system(name: str, graph: Path, context: PeerContext) -> HiddenStateSystem:
    options = load_onnxruntime().SessionOptions()
    options.intra_op_num_threads = context.threads
    options.log_severity_level = 3
    session = open_session(str(graph), options, ["CPUExecutionProvider"])
    types = {i.name: i.type for i in session.get_inputs()}

    def run(ids: Ids, mask: Ids) -> NDArray[np.float32]:
        inputs: dict[str, Any] = graph_inputs(list(types), ids, mask)
        for key, kind in types.items():
            if "int32" in kind:
                inputs[key] = inputs[key].astype(np.int32)
        hidden: NDArray[np.float32] = session.run(None, inputs)[0]
        return hidden

    return HiddenStateSystem(name, run, context, _bytes(graph))


def _bytes(graph: Path) -> int:
    """Bytes of a graph and of the file beside it that holds its weights."""
    data = graph.with_name(f"{graph.name}.data")
    return sum(file.stat().st_size for file in (graph, data) if file.is_file())


def _quantize(graph: Path, out: Path, per_channel: bool = False) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # It advises, on the root logger, to run a pre-processing step that changes nothing here.
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantize_dynamic(
                graph,
                out,
                per_channel=per_channel,
                weight_type=QuantType.QInt8,
                extra_options={"DefaultTensorType": _FLOAT},
            )
    finally:
        logging.disable(logging.NOTSET)
