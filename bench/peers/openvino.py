"""OpenVINO: as it comes, with 8-bit and with 4-bit weights by NNCF, and with 8-bit activations.

As it comes the inference precision is bfloat16 on processors that have it, and there it ignores
``DYNAMIC_QUANTIZATION_GROUP_SIZE``: the variants named ``dq`` ask for float32 and quantize the
activations in groups of 32 or 128. Weights are symmetric, which was the closer of the two kinds; those
of 4 bits have a scale for every 128 (or the largest divisor of the width below), the token table and
the last Linear 8 bits, which is NNCF's default.
"""

from __future__ import annotations

import contextlib
import io
import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedge.bench.peers.context import PeerContext
from embedge.bench.peers.hidden_state import HiddenStateSystem, graph_inputs
from embedge.bench.systems.tokens import Ids

__all__ = [
    "compile_for_cpu",
    "compress_weights",
    "floating_point",
    "int4",
    "int4_dq32",
    "int4_dq128",
    "int8",
    "int8_dq32",
    "int8_dq128",
]


def _system(bits: int | None, group: int | None, context: PeerContext) -> HiddenStateSystem:
    """Return a variant, compiled for the CPU.

    Args:
        bits: of the weights, ``None`` for the export's own floats.
        group: activations that share a scale, ``None`` for floats.
        context: one task's merged model.
    """
    import openvino

    core = openvino.Core()
    file = _file(core, bits, context)
    size = file.stat().st_size + file.with_suffix(".bin").stat().st_size
    compiled = compile_for_cpu(core, file, context.threads, group)
    kind = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    weights = {"f32": "fp32", "f16": "fp16"}.get(kind, kind) if bits is None else f"int{bits}"
    name = f"OpenVINO {weights}" + ("" if group is None else f" dq{group}")
    request = compiled.create_infer_request()
    inputs = [port.get_any_name() for port in compiled.inputs]

    def run(ids: Ids, mask: Ids) -> NDArray[np.float32]:
        results = request.infer(graph_inputs(inputs, ids, mask), share_inputs=True)
        hidden: NDArray[np.float32] = results[0]
        return hidden

    return HiddenStateSystem(name, run, context, size)


def compile_for_cpu(core: Any, model: Any, threads: int, group: int | None) -> Any:
    """Return OpenVINO's compiled model.

    Args:
        core: OpenVINO's.
        model: one of its models, or a file of one.
        threads: of a run.
        group: activations that share a scale, ``None`` for floats.
    """
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
    }
    if group is not None:
        settings["INFERENCE_PRECISION_HINT"] = "f32"
        settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = group
    return core.compile_model(model, "CPU", settings)


def compress_weights(model: Any, bits: int, width: int = 256) -> Any:
    """Return a model with NNCF's symmetric weights.

    Args:
        model: OpenVINO's.
        bits: 8 or 4.
        width: of the hidden states; a group of 4-bit weights is at most half of it.
    """
    import nncf
    from nncf.quantization.advanced_parameters import GroupSizeFallbackMode

    logging.getLogger("nncf").setLevel(logging.ERROR)
    options: dict[str, Any] = {"mode": nncf.CompressWeightsMode.INT8_SYM}
    if bits == 4:
        options = {
            "mode": nncf.CompressWeightsMode.INT4_SYM,
            "group_size": min(
                128, width // 2
            ),  # OpenVINO compiles no weight that is a single group
            "ratio": 1.0,
            "advanced_parameters": nncf.AdvancedCompressionParameters(
                group_size_fallback_mode=GroupSizeFallbackMode.ADJUST
            ),
        }
    with contextlib.redirect_stdout(io.StringIO()):  # NNCF prints tables and bars
        return nncf.compress_weights(model, **options)


def _file(core: Any, bits: int | None, context: PeerContext) -> Path:
    """Return the model in OpenVINO's format, made on the first call."""
    import openvino

    def write(folder: Path) -> None:
        model = core.read_model(context.onnx())
        if bits is not None:
            model = compress_weights(model, bits, context.config.hidden_size)
        openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)

    return context.made(f"openvino-{bits or 'fp'}", write) / "model.xml"


floating_point = partial(_system, None, None)
int8 = partial(_system, 8, None)
int8_dq32 = partial(_system, 8, 32)
int8_dq128 = partial(_system, 8, 128)
int4 = partial(_system, 4, None)
int4_dq32 = partial(_system, 4, 32)
int4_dq128 = partial(_system, 4, 128)
