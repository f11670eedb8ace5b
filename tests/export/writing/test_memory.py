"""An export needs memory for the largest layer, not for the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedge.bench.studies.memory import Cost, Shape, export_cost, write_adapter, write_model
from embedge.export.calibration.texts import packaged_texts

SMALL, LARGE = 30e6, 90e6  # bytes of weights


def cost_of(nbytes: float, precision: str, folder: Path) -> tuple[int, Cost]:
    """Bytes of the weights, and what exporting them took."""
    shape = Shape.of(nbytes, hidden=384, intermediate=1024)
    total = write_model(folder / "source", shape)
    write_adapter(folder / "adapter", shape)
    texts = folder / "texts.txt"  # GPTQ keeps a layer's inputs for these, whatever the model's size
    texts.write_text("\n".join(packaged_texts()[:8]), "utf-8")
    cost = export_cost(folder / "source", folder / "adapter", precision, folder / "out", texts)
    return total, cost


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("precision", ["int8"])
def test_a_model_of_many_layers_needs_little_more_than_one_of_few(
    precision: str, tmp_path: Path
) -> None:
    small, of_small = cost_of(SMALL, precision, tmp_path / "small")
    runs = (cost_of(LARGE, precision, tmp_path / f"large{run}") for run in range(3))
    # what other programs do at the time may add to one peak, a leak adds to each
    assert any(run.peak - of_small.peak < 0.35 * (large - small) for large, run in runs)
