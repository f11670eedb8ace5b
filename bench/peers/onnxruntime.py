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
from embedge.runtime.host.saturation import ask_for_exact_matmuls

__all__ = [
    "blockwise_int4",
    "exact_int8",
    "floating_point",
    "optimized_int8",
    "per_channel_int8",
    "plain_int8",
]

# Families whose graphs ONNX Runtime's optimizer fuses, under the name it knows them by.
_OPTIMIZER_TYPES = dict.fromkeys(
    ("bert", "roberta", "xlm-roberta", "camembert", "mpnet", "distilbert", "electra"), "bert"
)
_GRAPH = "model.onnx"
_DATA = "model.onnx.data"
_FLOAT = 1  # onnx.TensorProto.FLOAT; the fused operators have no type inference of their own


def floating_point(context: PeerContext) -> HiddenStateSystem:
    """Return the export as it is."""
    return _system("ORT fp32", context.onnx(), context)


def blockwise_int4(context: PeerContext) -> HiddenStateSystem:
    """Return the export with ``MatMulNBits`` in place of its matmuls."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    def write(folder: Path) -> None:
        model = onnx.load(context.onnx())
        quantizer = MatMulNBitsQuantizer(model, block_size=32, is_symmetric=True)
        logging.disable(logging.INFO)
        try:
            quantizer.process()
        finally:
            logging.disable(logging.NOTSET)
        onnx.save_model(
            quantizer.model.model, folder / _GRAPH, save_as_external_data=True, location=_DATA
        )

    return _system("ORT q4", context.made("ort-q4", write) / _GRAPH, context)


def plain_int8(context: PeerContext) -> HiddenStateSystem:
    """Return ``quantize_dynamic`` of the export."""
    folder = context.made("ort-int8", lambda folder: _quantize(context.onnx(), folder / _GRAPH))
    return _system("ORT dynamic int8", folder / _GRAPH, context)


def optimized_int8(context: PeerContext) -> HiddenStateSystem:
    """Return ``quantize_dynamic`` of the export after ``onnxruntime.transformers.optimizer``.

    Raises:
        ValueError: the optimizer does not know the family.
    """
    if not _has_fusions(context):
        family = context.config.model_type
        raise ValueError(f"ONNX Runtime's optimizer has no fusions for {family}")
    folder = context.made(
        "ort-fused-int8", lambda folder: _quantize(_fused(context), folder / _GRAPH)
    )
    return _system("ORT optimizer + dynamic int8", folder / _GRAPH, context)


def per_channel_int8(context: PeerContext) -> HiddenStateSystem:
    """Return the same with a scale per output channel of each weight, ONNX Runtime's most exact.

    Without the optimizer where that does not know the family.
    """
    name, graph = _per_channel(context)
    return _system(name, graph, context)


def exact_int8(context: PeerContext) -> HiddenStateSystem:
    """Return the same with ``session.x64quantprecision``, by which no product saturates on AVX2."""
    name, graph = _per_channel(context)
    return _system(f"{name}, exact", graph, context, exact=True)


def _per_channel(context: PeerContext) -> tuple[str, Path]:
    fusions = _has_fusions(context)

    def write(folder: Path) -> None:
        source = _fused(context) if fusions else context.onnx()
        _quantize(source, folder / _GRAPH, per_channel=True)

    name = "ORT optimizer + per-channel int8" if fusions else "ORT per-channel int8"
    return name, context.made("ort-per-channel-int8", write) / _GRAPH


def _has_fusions(context: PeerContext) -> bool:
    return context.config.model_type in _OPTIMIZER_TYPES


def _fused(context: PeerContext) -> Path:
    """Return the fp32 export after the optimizer, made on the first call."""
    from onnxruntime.transformers import optimizer

    config = context.config

    def write(folder: Path) -> None:
        optimizer.optimize_model(
            str(context.onnx()),
            model_type=_OPTIMIZER_TYPES[config.model_type],
            num_heads=config.num_attention_heads,
            hidden_size=config.hidden_size,
        ).save_model_to_file(str(folder / _GRAPH))

    return context.made("ort-fused", write) / _GRAPH


def _system(
    name: str, graph: Path, context: PeerContext, *, exact: bool = False
) -> HiddenStateSystem:
    options = load_onnxruntime().SessionOptions()
    if exact:
        ask_for_exact_matmuls(options)
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
