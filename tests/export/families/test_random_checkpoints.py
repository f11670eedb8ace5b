"""Checkpoints that ``examples/random_checkpoint.py`` writes are exported as the published ones are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from outlier_channels import OUTLIERS
from random_checkpoint import V5_TASKS, WRITERS, write_checkpoint
from safetensors.torch import load_file

from embedge.export import export_bundle
from embedge.runtime import Embedder

TEXTS = ["the train was late because of snow", "a", "how do I sort a dictionary by value?"]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(WRITERS))
def test_a_layer_of_each_is_exported_with_its_tasks(name: str, tmp_path: Path) -> None:
    source = write_checkpoint(name, tmp_path / "model", layers=1, vocabulary=512)

    adapters = None if name.startswith("v5") else {"text": None}  # v5 brings its own
    export_bundle(source, adapters=adapters, precisions=["fp32"], out=tmp_path / "bundle")

    model = Embedder(tmp_path / "bundle", precision="fp32")
    assert set(model.tasks) == set(adapters or V5_TASKS)
    found = {task: model.encode(TEXTS, task=task) for task in model.tasks}
    for vectors in found.values():
        lengths = np.linalg.norm(vectors, axis=1)
        assert np.allclose(lengths, 1, atol=1e-5) or name == "nomic"  # which normalizes nothing
        assert np.isfinite(vectors).all()
        assert lengths.min() > 0
    kinds = [vectors.round(4).tobytes() for vectors in found.values()]
    assert len({*kinds}) == len(kinds)


def test_a_few_channels_of_the_table_are_much_larger(tmp_path: Path) -> None:
    source = write_checkpoint("v5-nano", tmp_path / "model", layers=1, vocabulary=512)

    table = load_file(source / "model.safetensors")["embed_tokens.weight"].float()

    sizes = np.sort(table.abs().mean(0).numpy())
    assert sizes[-OUTLIERS] > 10 * sizes[-OUTLIERS - 1]
