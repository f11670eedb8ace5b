"""Branches of merged graphs are fitted in turns with the weights that they lie beside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx.numpy_helper import to_array

from embedge.export import export_bundle
from embedge.export.calibration import gptq
from embedge.export.calibration.texts import read_texts
from embedge.export.schemes.int4 import Int4Scheme
from embedge.quant import int4
from tests.helpers.exports import WIDE
from tests.helpers.models import Reference, linears, make_model, save, save_adapter

pytestmark = pytest.mark.slow

PLAIN = ("attention.output.dense", "output.dense")  # their inputs are neither shifted nor smoothed


def from_panels(panels: NDArray[Any]) -> NDArray[np.float32]:
    lines, depth, columns, rows = panels.shape
    return panels.transpose(1, 3, 0, 2).reshape(depth * rows, lines * columns).astype(np.float32)


def stored(graph: Path, name: str) -> NDArray[np.float32]:
    """The weight of a Linear at int4 with its branch, float32 ``[out, in]``."""
    of = {
        tensor.name.removeprefix(f"{name}."): to_array(tensor)
        for tensor in onnx.load(graph).graph.initializer
        if tensor.name.startswith(f"{name}.")
    }
    scales = of["scales"]
    values = int4.unpack_pairs(of["weight"], 32)
    main = int4.dequantize(values, scales, int4.unpack_pairs(of["zero_points"], scales.shape[1]))
    down = from_panels(of["branch_down"]) * of["branch_down_scale"]
    up = from_panels(of["branch_up"]) * of["branch_up_scale"]
    result: NDArray[np.float32] = main.reshape(len(main), -1) + (down @ up).T
    return result


def test_turns_leave_less_of_the_outputs_than_one_fit(
    few_texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save(make_model("bert", **WIDE), tmp_path / "model")
    adapter = save_adapter(model, tmp_path / "adapter", target=linears("bert"), size=0.5)
    graphs = {}
    for turns in (0, 2):
        monkeypatch.setattr(gptq, "_TURNS", turns)
        graphs[turns] = (
            export_bundle(
                model,
                adapters={"task": adapter},
                precisions=["int4"],
                calibration=few_texts,
                branch_rank=16,
                out=tmp_path / str(turns),
            )
            / "int4/task.onnx"
        )
    reference = Reference(model, adapter)
    modules = {
        name.partition("base_model.model.")[2]: module
        for name, module in reference.model.named_modules()
        if name.endswith(PLAIN) and hasattr(module, "base_layer")
    }
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    for name, module in modules.items():
        module.register_forward_pre_hook(
            lambda _, args, of=inputs[name]: of.append(args[0].flatten(0, -2).detach())
        )
    reference.encode(read_texts(few_texts))
    assert len(modules) == 4
    ratios = []
    for name, module in modules.items():
        weight = module.base_layer.weight + module.get_delta_weight("default")
        x = torch.cat(inputs[name])
        damp = Int4Scheme.damping * float(x.square().sum(0).mean())
        lost = {}
        for turns, graph in graphs.items():
            error = weight - torch.from_numpy(stored(graph, name))
            lost[turns] = float((x @ error.T).square().sum() + damp * error.square().sum())
        ratios.append(lost[2] / lost[0])
        assert lost[0] < 0.05 * float((x @ weight.T).square().sum())
    assert np.mean(ratios) < 0.985, ratios
