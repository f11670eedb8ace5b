"""An export writes each graph once, and reads a weight once for each thing that is done with it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import embedge.export.model as model_module
from embedge.export import export_bundle
from embedge.export.graph.task_graph import task_graph
from embedge.export.weights.task import TaskWeights
from tests.helpers.models import make_model, save, save_adapter


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reads") / "model"
    return save(make_model("qwen2", hidden_size=32, intermediate_size=48), folder, pooling="mean")


@pytest.fixture
def counted(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Counter[str], list[str]]:
    """Reads by tensor and precisions by graph, of an export of two tasks at int8 and int4."""
    reads: Counter[str] = Counter()
    graphs: list[str] = []
    read, write = TaskWeights.read, task_graph

    def count_read(self: TaskWeights, name: str, rows: slice | None = None) -> Any:
        reads[name] += 1
        return read(self, name, rows)

    def count_graph(*arguments: Any, **options: Any) -> Any:
        g = write(*arguments, **options)
        graphs.append(g.scheme.precision)
        return g

    monkeypatch.setattr(TaskWeights, "read", count_read)
    monkeypatch.setattr(model_module, "task_graph", count_graph)
    adapter = save_adapter(source, tmp_path / "adapter", target=["q_proj", "o_proj"])
    export_bundle(
        source,
        adapters={"plain": None, "task": adapter},
        precisions=["int8", "int4"],
        out=tmp_path / "bundle",
    )
    return reads, graphs


@pytest.mark.slow
def test_each_graph_is_written_once(counted: tuple[Counter[str], list[str]]) -> None:
    """fp32: for all checks and the source's hash; int4's weights are read by two graphs a task."""
    assert counted[1] == ["fp32", "int8", "int8", *["int4", "int4-unpacked"] * 2]


@pytest.mark.slow
def test_a_weight_is_rounded_as_it_was_read_to_run(
    counted: tuple[Counter[str], list[str]],
) -> None:
    """Layers run for the smoothing, then at each precision for the backbone's Hessians and the task's."""
    found = {name: count for name, count in counted[0].items() if name.endswith("_proj.weight")}
    down = {name for name in found if ".down_proj." in name}  # outliers are read beside it
    assert {name: count for name, count in found.items() if name not in down} == dict.fromkeys(
        found.keys() - down, 5
    )
    assert down
