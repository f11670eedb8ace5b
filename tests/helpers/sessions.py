"""One way for tests to open a graph with ONNX Runtime alone.

Integer matmuls are exact as the runtime has them: where the processor's saturate, sessions are asked
for exact ones. What checks an operator checks it with ``EXACT_MODES``: as the runtime asks here, and
asked in any case, as on a processor without VNNI.
"""

from __future__ import annotations

import os
from typing import Any

import onnx
import onnxruntime
import pytest

from embedge.runtime.host.saturation import ask_for_exact_matmuls, keep_matmuls_exact

EXACT_MODES = [pytest.param(False, id="as-the-runtime"), pytest.param(True, id="asked-for-exact")]


def session_options(*, own: bool = False, always_exact: bool = False, threads: int = 1) -> Any:
    """Options of a session whose integer matmuls are exact on any processor.

    ``own``: embedge's kernels will run them. They are exact, and ONNX Runtime must not be asked to change them.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # tests share cores
    if always_exact:
        ask_for_exact_matmuls(options)
    elif not own:
        keep_matmuls_exact(options)
    return options


def open_graph(
    graph: onnx.ModelProto | bytes | str | os.PathLike[str],
    options: Any = None,
    *,
    always_exact: bool = False,
    threads: int = 1,
) -> onnxruntime.InferenceSession:
    """A session on the CPU of a graph's file, its bytes or its message."""
    if options is None:
        options = session_options(always_exact=always_exact, threads=threads)
    if isinstance(graph, onnx.ModelProto):
        graph = graph.SerializeToString()
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
