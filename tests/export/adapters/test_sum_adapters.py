"""examples/sum_adapters.py: the sum of adapters is each one's change of the weights, added up."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.helpers.models import Reference, make_model, save, save_adapter

LAYER = "encoder.layer.0.attention.self.value"


def change(source: Path, adapter: Path) -> torch.Tensor:
    """What an adapter adds to a weight."""
    module = Reference(source, adapter).model.base_model.model.get_submodule(LAYER)
    delta: torch.Tensor = module.get_delta_weight("default")
    return delta.detach()


@pytest.mark.slow
def test_the_changes_are_added_up(tmp_path: Path) -> None:
    source = save(make_model("bert"), tmp_path / "model")
    folders = [
        save_adapter(source, tmp_path / name, target=["query", "value"], seed=seed, r=rank)
        for name, seed, rank in (("a", 1, 3), ("b", 2, 5))
    ]
    given = [f"{folders[0]}=1", f"{folders[1]}=0.5"]
    command = [sys.executable, str(ROOT / "examples/sum_adapters.py"), str(source)]
    subprocess.run([*command, str(tmp_path / "sum"), *given], check=True, timeout=300)
    expected = change(source, folders[0]) + 0.5 * change(source, folders[1])
    assert torch.allclose(change(source, tmp_path / "sum"), expected, atol=1e-6)
    again = subprocess.run(
        [*command, str(tmp_path / "sum"), *given], check=False, capture_output=True, timeout=300
    )
    assert again.returncode == 2
    assert b"expected no such folder" in again.stderr
