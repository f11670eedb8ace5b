"""Writes the trained model in the published layout of jina-embeddings-v4, in bfloat16."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from jina_v4_layout import Size, adapter_config, old_prefix
from random_jina_v4 import write_settings
from safetensors.torch import save_file


def write_base(folder: Path, model: torch.nn.Module, size: Size) -> None:
    """Write configurations and base weights; the tokenizer is there already."""
    write_settings(folder, "published", size)
    tensors = {
        old_prefix(name): weight.detach().to(torch.bfloat16).contiguous()
        for name, weight in model.named_parameters()
    }
    name = "model-00001-of-00001.safetensors"
    save_file(tensors, folder / name, metadata={"format": "pt"})
    total = sum(2 * tensor.numel() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(sorted(tensors), name)}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps(index, indent=1) + "\n", "utf-8"
    )


def write_adapters(
    folder: Path, adapters: Mapping[str, Mapping[str, torch.Tensor]], size: Size
) -> None:
    """Write the adapters of all tasks into one file, as published."""
    place = folder / "adapters"
    place.mkdir(exist_ok=True)
    tensors = {
        f"{name.removesuffix('.weight')}.{task}.weight": tensor.to(torch.bfloat16).contiguous()
        for task, found in adapters.items()
        for name, tensor in found.items()
    }
    save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = adapter_config(rank=size.rank, alpha=size.rank, multi_task=True)
    (place / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
