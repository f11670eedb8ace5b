"""OpenVINO: int8 weights by NNCF, dynamic quantization of activations in groups of 128.

The inference precision is left at its default, which is bfloat16 on processors that have it.
"""

from __future__ import annotations

import contextlib
import io
import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedge.bench._hidden_state import HiddenStateSystem, graph_inputs
from embedge.bench._peer_context import PeerContext
from embedge.bench._tokens import Ids

__all__ = ["openvino_int8"]

_SETTINGS = {"PERFORMANCE_HINT": "LATENCY", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 128}


class _OpenVinoSystem(HiddenStateSystem):
    def __init__(self, compiled: Any, context: PeerContext, bytes_on_disk: int) -> None:
        super().__init__("OpenVINO int8", context.source, context.tokens, bytes_on_disk)
        self._request = compiled.create_infer_request()
        self._inputs = [port.get_any_name() for port in compiled.inputs]

    def forward(self, ids: Ids, mask: Ids) -> NDArray[np.float32]:
        results = self._request.infer(graph_inputs(self._inputs, ids, mask), share_inputs=True)
        hidden: NDArray[np.float32] = results[0]
        return hidden


def openvino_int8(context: PeerContext) -> HiddenStateSystem:
    """Return the export with compressed weights, compiled for the CPU."""
    import nncf
    import openvino

    logging.getLogger("nncf").setLevel(logging.ERROR)
    core = openvino.Core()
    with contextlib.redirect_stdout(io.StringIO()):  # NNCF prints tables and bars
        model = nncf.compress_weights(
            core.read_model(context.onnx()), mode=nncf.CompressWeightsMode.INT8_SYM
        )
    file = context.workdir / "openvino-int8.xml"
    openvino.save_model(model, file, compress_to_fp16=False)
    size = file.stat().st_size + file.with_suffix(".bin").stat().st_size
    settings = {**_SETTINGS, "INFERENCE_NUM_THREADS": context.threads}
    return _OpenVinoSystem(core.compile_model(file, "CPU", settings), context, size)
