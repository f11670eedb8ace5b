"""Sessions whose weights are inputs: ONNX Runtime keeps no copies of them, packed or not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import helper

from embedge.export.calibration.scratch import mapped_copy
from embedge.export.graph.builder import Graph
from embedge.export.graph.onnx_model import to_model
from embedge.runtime.host.onnxruntime import load_onnxruntime, open_session

FloatArray = NDArray[np.float32]


class WeightSession:
    """A graph whose weights are inputs.

    Attributes:
        weights: by the name of their input.

    Args:
        g: the graph, which this completes.
        scratch: folder for large weights, which are mapped from there.
    """

    def __init__(self, g: Graph, scratch: Path) -> None:
        g.prune()
        self.weights: dict[str, FloatArray] = {}
        for initializer in g.initializers.values():
            for spec, array in zip(initializer.specs, initializer.compute(), strict=True):
                self.weights[spec.name] = mapped_copy(np.ascontiguousarray(array), scratch)
                info = helper.make_tensor_value_info(spec.name, spec.elem_type, spec.shape)
                g.inputs.append(info)
        for output in g.outputs:
            output.type.tensor_type.ClearField("shape")
        options = load_onnxruntime().SessionOptions()
        options.enable_cpu_mem_arena = False
        options.log_severity_level = 3
        # between runs numpy works, and threads that wait by spinning would take a core from it
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        model = to_model(g, [], "calibration", {})
        self._session = open_session(model.SerializeToString(), options, ["CPUExecutionProvider"])
        self._inputs = {i.name for i in self._session.get_inputs()}

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> list[FloatArray]:
        """The outputs for some inputs, of which the graph takes those it has, and its weights.

        Args:
            feeds: by name; a weight among them replaces the session's own.
        """
        given = {**self.weights, **feeds}
        accepted = {name: value for name, value in given.items() if name in self._inputs}
        outputs: list[FloatArray] = self._session.run(None, accepted)
        return outputs
