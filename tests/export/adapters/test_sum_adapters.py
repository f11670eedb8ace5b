"""examples/sum_adapters.py: the sum of adapters is each one's change of the weights, added up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sum_adapters import main

from tests.helpers.models import Reference, make_model, save, save_adapter

LAYER = "encoder.layer.0.attention.self.value"


def change(source: Path, adapter: Path) -> torch.Tensor:
    """What an adapter adds to a weight."""
    module = Reference(source, adapter).model.base_model.model.get_submodule(LAYER)
    delta: torch.Tensor = module.get_delta_weight("default")
    return delta.detach()


def test_the_changes_are_added_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(make_model("bert"), tmp_path / "model")
    folders = [
        save_adapter(source, tmp_path / name, target=["query", "value"], seed=seed, r=rank)
        for name, seed, rank in (("a", 1, 3), ("b", 2, 5))
    ]
    given = [str(source), str(tmp_path / "sum"), f"{folders[0]}=1", f"{folders[1]}=0.5"]
    main(given)
    expected = change(source, folders[0]) + 0.5 * change(source, folders[1])
    assert torch.allclose(change(source, tmp_path / "sum"), expected, atol=1e-6)
    with pytest.raises(SystemExit, match="2"):
        main(given)
    assert "expected no such folder" in capsys.readouterr().err


def renamed(adapter: Path, old: str, new: str) -> None:
    """Renames modules in the file of an adapter."""
    file = adapter / "adapter_model.safetensors"
    save_file({key.replace(old, new): tensor for key, tensor in load_file(file).items()}, file)


def test_modules_of_a_model_with_a_head_are_found(tmp_path: Path) -> None:
    source = save(make_model("bert"), tmp_path / "model")
    adapter = save_adapter(source, tmp_path / "a", target=["query", "value"], r=3)
    expected = change(source, adapter)
    renamed(adapter, "base_model.model.", "base_model.model.model.")
    main([str(source), str(tmp_path / "sum"), f"{adapter}=1"])
    assert torch.count_nonzero(expected)
    assert torch.allclose(change(source, tmp_path / "sum"), expected, atol=1e-6)


def test_what_the_model_lacks_is_an_error_unless_it_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save(make_model("bert"), tmp_path / "model")
    adapter = save_adapter(source, tmp_path / "a", target=["query", "value"], r=3)
    renamed(adapter, "layer.1.attention.self.value", "projector")
    call = [str(source), str(tmp_path / "sum"), f"{adapter}=1"]
    with pytest.raises(SystemExit, match="2"):
        main(call)
    assert "projector.lora_A.weight is of a module that the model lacks" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):  # its place has no values
        main([*call, "--leave-out", "projector"])
    assert "no values of" in capsys.readouterr().err
    assert not (tmp_path / "sum").exists()
