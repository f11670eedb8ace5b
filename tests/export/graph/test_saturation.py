"""Every output of a graph of 8-bit products depends on the product that tells whether they saturate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from embedge.export import export_bundle
from embedge.export.graph.saturation import _MOST, _PAIRS, ADVICE
from tests.helpers.jina_v4 import write_checkpoint
from tests.helpers.models import make_model, save


def test_the_product_is_0_and_another_number_where_pairs_saturate() -> None:
    pairs = (_MOST * _PAIRS).reshape(-1, 2).sum(axis=1)
    assert pairs.sum() == 0
    saturated = np.clip(pairs, -(1 << 15), (1 << 15) - 1).sum()
    assert saturated not in (0, -1)  # both would find the one value


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "mpnet", "jina-embeddings-v4"])
def test_no_output_is_given_without_it(name: str, tmp_path: Path) -> None:
    """mpnet's attention and pooling do without the lengths; jina-embeddings-v4 has two outputs."""
    if name == "jina-embeddings-v4":
        source = write_checkpoint(tmp_path / name)
        out = export_bundle(source, calibration="none", modality="text", out=tmp_path / "out")
    else:
        source = save(make_model(name), tmp_path / name)
        out = export_bundle(
            source, adapters={"task": None}, calibration="none", out=tmp_path / "out"
        )
    file = next((out / "int8").glob("*.onnx"))
    graph = onnx.load(str(file), load_external_data=False).graph
    makers = {made: node for node in graph.node for made in node.output}
    assert len(graph.output) == 1 + (name == "jina-embeddings-v4")
    for output in graph.output:
        assert ADVICE in ancestors(output.name, makers)


def ancestors(value: str, makers: dict[str, onnx.NodeProto]) -> set[str]:
    """Names of the nodes that a value depends on."""
    found, waiting = set[str](), [value]
    while waiting:
        node = makers.get(waiting.pop())
        if node is not None and node.name not in found:
            found.add(node.name)
            waiting += node.input
    return found
