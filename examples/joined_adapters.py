"""A weighted sum of LoRA adapters as one adapter of a model, by PEFT; every tensor of their files is used.

Files name modules as they lie in the model that was trained, such as ``model.layers.0``. In the bare backbone that is
``layers.0``, and PEFT then leaves an adapter at zero with no more than a warning. Here such names are found, and others
are an error.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file

__all__ = ["join_adapters", "load_adapter", "write_adapter"]

_PEFT = "base_model.model."
_HEAD = "model."  # of the backbone in a model with a head


def load_adapter(
    model: Any, folder: Path, name: str = "default", leave_out: Collection[str] = ()
) -> PeftModel:
    """A model with the adapter of a folder, unmerged.

    Args:
        model: bare, or what this function gave for another adapter.
        folder: of the adapter, in PEFT's format.
        name: of the adapter in the model.
        leave_out: last parts of names of modules that the model may lack, such as ``multi_vector_projector``.

    Raises:
        ValueError: for a tensor of another module that the model lacks, or one that PEFT does not take.
    """
    config = PeftConfig.from_pretrained(str(folder))
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    modules = {path.replace(".base_layer", "") for path, _ in bare.named_modules()}
    tensors = _renamed(load_file(folder / "adapter_model.safetensors"), modules, folder, leave_out)
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
    else:
        model = get_peft_model(model, config, adapter_name=name)
    result = set_peft_model_state_dict(model, tensors, adapter_name=name)
    wrong = [*result.unexpected_keys, *(key for key in result.missing_keys if f".{name}." in key)]
    if wrong:
        raise ValueError(f"{folder}: PEFT found no place for, or no values of, {wrong[0]}")
    joined: PeftModel = model
    return joined


def _renamed(
    tensors: Mapping[str, torch.Tensor],
    modules: Collection[str],
    folder: Path,
    leave_out: Collection[str],
) -> dict[str, torch.Tensor]:
    """The tensors by the names of modules in the model at hand."""
    renamed = {}
    for key, tensor in tensors.items():
        path = key.removeprefix(_PEFT)
        module, _, rest = path.partition(".lora_")
        if module.rpartition(".")[2] in leave_out:
            continue
        for found in (module, module.removeprefix(_HEAD), _HEAD + module):
            if found in modules:
                renamed[f"{_PEFT}{found}.lora_{rest}"] = tensor
                break
        else:
            raise ValueError(
                f"{folder}: {key} is of a module that the model lacks; leave it out by "
                f"--leave-out {module.rpartition('.')[2]}, or name the model that the adapter was trained on"
            )
    return renamed


def join_adapters(
    model: Any, weights: Sequence[tuple[Path, float]], name: str, leave_out: Collection[str] = ()
) -> PeftModel:
    """A model with ``Σ weight · adapter`` as its one adapter. PEFT joins by ranks (``"cat"``), so the sum is exact.

    Args:
        model: bare.
        weights: folder of each adapter and its weight.
        name: of the sum.
        leave_out: as for :func:`load_adapter`.

    Raises:
        ValueError: as :func:`load_adapter`.
    """
    parts = [f"part_{number}" for number in range(len(weights))]
    for part, (folder, _) in zip(parts, weights, strict=True):
        model = load_adapter(model, folder, part, leave_out)
    joined: PeftModel = model
    joined.add_weighted_adapter(parts, [w for _, w in weights], name, combination_type="cat")
    joined.set_adapter(name)
    for part in parts:
        joined.delete_adapter(part)
    return joined


def write_adapter(joined: PeftModel, name: str, out: Path) -> None:
    """Write an adapter of a model in PEFT's format.

    Args:
        joined: the model.
        name: of the adapter in it.
        out: the adapter's folder, which must not exist.
    """
    with tempfile.TemporaryDirectory() as work:
        joined.save_pretrained(work, selected_adapters=[name], save_embedding_layers=False)
        (Path(work) / name / "README.md").unlink(missing_ok=True)
        shutil.copytree(Path(work) / name, out)
